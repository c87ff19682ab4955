"""What a run of `hogwild` leaves behind, and what follows from several: tables, a claim, a picture.

Knows numbers, not cells, models or clients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, quantiles
from typing import Any, Final

from experiments import frame

MODES: Final = ("free", "paused")
NOISE_FACTOR: Final = 10
"""A probe is off a whole version if it is this many times farther than two implementations are."""

SHORTEST_GAP_MS: Final = 10.0
"""Shorter ones, of tokens that arrive together, are drawn as this."""


@dataclass(frozen=True)
class Probe:
    """One answer to the question how likely a fixed text is, held against whole versions.

    Those are the versions from `first` to `last`, the last of which may have been in the making.
    """

    first: int
    """Version of the weights when the request came."""
    last: int
    """Newest version that any weight may have been of when it was answered."""
    distance: float
    """Largest difference of a token's log-probability from the nearest of them, in nats."""
    outside: float
    """Largest distance of a token's log-probability from the range that they span, in nats."""
    worse: float
    """How much less likely the text was than under each of them, in nats per token; or 0."""
    moved: float
    """Largest difference of a token's log-probability between two successive ones."""


@dataclass
class Phase:
    """What clients saw in one window of time."""

    seconds: float = 0.0
    tokens: int = 0
    streams: int = 0
    errors: list[str] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    """Of the requests that began in the window."""
    gap_ms: list[float] = field(default_factory=list)
    """Between two tokens of one stream, the first of them in the window."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Run:
    """One finished run; a line of the output."""

    setting: str
    mode: str
    repetition: int
    losses: list[float]
    """Of each step."""
    alone_losses: list[float]
    """Of the same steps, made without readers."""
    drift: float
    alone_drift: float
    rest_distance: float
    """At rest after the job: largest difference of served and trainer's log-probabilities."""
    noise: float
    """The same before the job, between vLLM and transformers in another process."""
    job_seconds: float
    step_seconds: float
    idle: Phase
    learning: Phase
    probes: list[Probe]
    """During the job."""

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Run":
        phases = {name: Phase(**row[name]) for name in ("idle", "learning")}
        probes = [Probe(**probe) for probe in row["probes"]]
        return cls(**row | phases | {"probes": probes})

    @property
    def loss_difference(self) -> float:
        """Largest difference of a step's loss from the same step made without readers."""
        both = zip(self.losses, self.alone_losses, strict=True)
        return max(abs(one - two) for one, two in both)

    def last_loss(self, num_samples: int) -> float:
        """Mean over the last pass."""
        return fmean(self.losses[-num_samples:])

    def off(self) -> list[Probe]:
        """Probes that saw no whole version."""
        return [probe for probe in self.probes if probe.distance > NOISE_FACTOR * self.noise]

    def show(self) -> str:
        """One line."""
        return (
            f"{self.mode:<6} {self.repetition}: last loss {self.losses[-1]:.4f} (alone, "
            f"{self.loss_difference:.1g} apart), drift {self.drift:.4f}, "
            f"{len(self.learning.errors)} errors, gap p99 {p99(self.learning.gap_ms):.0f} ms (idle "
            f"{p99(self.idle.gap_ms):.0f}), {len(self.off())} of {len(self.probes)} probes off, "
            f"job {self.job_seconds:.0f} s"
        )


def p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else math.nan


def spread(values: Sequence[float], form: str = ".0f") -> str:
    """Mean over runs, with the lowest and the highest."""
    if not values:
        return "none"
    return f"{fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(runs: Sequence[Run], num_samples: int) -> str:
    """Markdown: what clients saw, what was learned and served, and the claim with its numbers."""
    by_mode = {mode: [run for run in runs if run.mode == mode] for mode in MODES}
    lines = [
        "| | runs | errors of streams | tokens/s | first token, median ms | p99 "
        "| gap, median ms | p99 | longest |",
        "|---|---|---|---|---|---|---|---|---|",
        _clients("idle", [run.idle for run in runs]),
        *(_clients(f"learning, {m}", [run.learning for run in by_mode[m]]) for m in MODES),
        "",
        "| | last pass, mean loss | drift, nats/token | s/step | job, s | probes | off a whole "
        "version | off by, median of those | most | outside the range, most | worse, most "
        "| at rest, served from trainer's, most |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_served(mode, by_mode[mode], num_samples) for mode in MODES),
        "",
        *claim(by_mode["free"], by_mode["paused"]),
    ]
    return "\n".join(lines)


def _clients(name: str, phases: Sequence[Phase]) -> str:
    figures: tuple[tuple[str, Callable[[list[float]], float]], ...] = (
        ("first_token_ms", median),
        ("first_token_ms", p99),
        ("gap_ms", median),
        ("gap_ms", p99),
        ("gap_ms", max),
    )
    cells = [
        f"{sum(len(phase.errors) for phase in phases)} of {sum(p.streams for p in phases)}",
        spread([phase.tokens_per_s for phase in phases], ".1f"),
        *(
            spread([figure(getattr(phase, key)) for phase in phases if getattr(phase, key)])
            for key, figure in figures
        ),
    ]
    return f"| {name} | {len(phases)} | {' | '.join(cells)} |"


def _served(mode: str, runs: Sequence[Run], num_samples: int) -> str:
    off = [probe for run in runs for probe in run.off()]
    cells = [
        spread([run.last_loss(num_samples) for run in runs], ".6f"),
        spread([run.drift for run in runs], ".6f"),
        spread([run.step_seconds for run in runs], ".2f"),
        spread([run.job_seconds for run in runs]),
        str(sum(len(run.probes) for run in runs)),
        str(len(off)),
        f"{median(probe.distance for probe in off):.2g}" if off else "-",
        f"{max(probe.distance for run in runs for probe in run.probes):.2g}",
        f"{max(probe.outside for run in runs for probe in run.probes):.2g}",
        f"{max(probe.worse for run in runs for probe in run.probes):.2g}",
        f"{max(run.rest_distance for run in runs):.2g}",
    ]
    return f"| {mode} | {' | '.join(cells)} |"


def claim(free: Sequence[Run], paused: Sequence[Run]) -> list[str]:
    """What can be said of "no pause does no harm", from these runs."""
    probes = [probe for run in free for probe in run.probes]
    off = [probe for run in free for probe in run.off()]
    noise = max(run.noise for run in (*free, *paused))
    worse = [probe for probe in off if probe.worse > NOISE_FACTOR * noise]
    same_name = sum(probe.first == probe.last for probe in off)
    moved = f"{median(probe.moved for probe in off):.2g}" if off else "-"
    steps = sum(len(run.losses) for run in free)
    harm = max(run.loss_difference for run in free)
    errors = sum(len(run.learning.errors) for run in free)
    return [
        f"- What is learned: {steps} steps without a pause, losses at most {harm:.2g} nats from "
        f"the same steps without readers; drift at most "
        f"{max(abs(run.drift - run.alone_drift) for run in free):.2g} apart.",
        f"- Clients: {errors} errors without a pause, "
        f"{sum(len(run.learning.errors) for run in paused)} with it.",
        f"- What is served at rest is the trainer's, to {max(r.rest_distance for r in free):.2g} "
        f"nats (noise of two implementations: {noise:.2g}).",
        f"- What is served during a step is not always a version: {len(off)} of {len(probes)} "
        f"probes were off every whole version that they may have read; where so, a step moved "
        f"their tokens by up to {moved} (median). {same_name} of them carry one version as first "
        f"and last. {len(worse)} were less likely than under each of those versions, by "
        f"{max((p.worse for p in probes), default=0):.2g} nats per token at most.",
    ]


def draw(path: str, runs: Sequence[Run], title: str) -> None:
    """Loss by step, gaps between tokens, and how far probes were from a whole version."""
    figure = frame.figure(13, 4.6)
    loss, gaps, off = figure.subplots(1, 3)
    looks = {"free": ("#0072B2", "-"), "paused": ("#D55E00", "--")}
    for mode, (colour, line) in looks.items():
        mine = [run for run in runs if run.mode == mode]
        for number, run in enumerate(mine):
            label = None if number else mode
            steps = range(1, len(run.losses) + 1)
            loss.plot(steps, run.losses, color=colour, linestyle=line, alpha=0.7, label=label)
        waits = [gap for run in mine for gap in run.learning.gap_ms]
        _tail(gaps, waits, f"learning, {mode}", colour, line, SHORTEST_GAP_MS)
        distances = [probe.distance for run in mine for probe in run.probes]
        _tail(off, distances, f"served, {mode}", colour, line)
    waits = [gap for run in runs for gap in run.idle.gap_ms]
    _tail(gaps, waits, "idle", "#999999", ":", SHORTEST_GAP_MS)
    moved = [probe.moved for run in runs for probe in run.probes if probe.moved]
    _tail(off, moved, "how far one step moves", "#999999", ":")
    loss.plot(
        range(1, len(runs[0].alone_losses) + 1),
        runs[0].alone_losses,
        ".",
        color="#000000",
        markersize=4,
        label="without readers",
    )
    loss.set(xlabel="step", ylabel="loss before the step", title="what is learned")
    gaps.set(xlabel="gap between two tokens (ms)", ylabel="share that is longer", xscale="log")
    gaps.set(yscale="log", title="what clients wait for")
    off.set(xlabel="distance from the nearest whole version (nats)", xscale="log")
    off.set(ylabel="share of probes that are farther", title="what is served during a job")
    for axis in (loss, gaps, off):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    frame.draw_to(path, figure)


def _tail(
    axis: Any, values: Sequence[float], label: str, colour: str, line: str, least: float = 1e-7
) -> None:
    ordered = sorted(max(value, least) for value in values)
    shares = [1 - at / len(ordered) for at in range(len(ordered))]
    axis.plot(ordered, shares, color=colour, linestyle=line, label=label)
