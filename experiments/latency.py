"""What answers wait for while the model learns, with and without a latency budget.

    .venv/bin/python -m experiments.latency --json latency.json --plot docs/latency.png   # 12 min
    .venv/bin/python -m experiments.latency --rounds 1 --idle 10 --learn 15
    .venv/bin/python -m experiments.latency --streams 32 --duties 0.5 0.25 \\
        --set engine.enforce_eager=false                       # on a GPU, with CUDA graphs

Readers ask for streams all the time, each some time after its last one. By turns there is a cell
without a budget and one with it, `--rounds` of each, since machines are faster at one time than at
another; in each cell nothing is learned at first (`idle`), and then a job is; without a budget,
further jobs may ask for less of the time (`--duties`). The very first shows what learning adds to
the 95th percentile of gaps between tokens; the budget allows a share of that (`--allow`), so that
it is neither idle nor out of reach on any machine. What is compared are ratios to `idle` in the
same cell; what the budget costs is how many steps are made. Only one cell may run on the machine.
"""

import argparse
import asyncio
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, Final

import aiohttp

from apollo.weights.adopt import adopt
from experiments import frame
from experiments.cells import running_cell

WARM_UP_S: Final = 5.0
SETTLE_S: Final = 15.0
"""Of a job before it is looked at: the throttle has found its duty by then."""
THINK_S: Final = 1.0
LOOK_S: Final = 0.5
TIMEOUT_S: Final = 600
WITHOUT, WITH = "no budget", "budget"
IDLE, LEARNING = "idle", "learning"
SHORTEST_DRAWN_MS: Final = 1
LINES: Final = (":", "-", "--", "-.")
"""Of idle, and of the jobs."""
COLUMNS: Final = {
    "gap_p50": "gap p50, ms",
    "gap_p95": "p95",
    "gap_p99": "p99",
    "first_p50": "first token p50, ms",
    "first_p95": "p95",
    "tokens_per_s": "tokens/s",
    "steps_per_min": "steps/min",
    "duty": "duty",
}
ANSWER: Final = "Because the moon pulls at the sea, and the sea gives way a little, twice a day."
SAMPLE: Final = {
    "messages": [
        {"role": "user", "content": "Why are there tides?"},
        {"role": "assistant", "content": ANSWER},
    ]
}
CONFIG: Final = {"epochs": 1000, "learning_rate": 1e-9}
"""Longer than any window, and without an effect on what is said."""


@dataclass
class Window:
    """What readers saw while one thing was going on."""

    seconds: float = 0.0
    gap_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    steps: int = 0
    duties: list[float] = field(default_factory=list)

    def add(self, other: "Window") -> None:
        """What was seen in another cell, too."""
        self.seconds += other.seconds
        self.gap_ms += other.gap_ms
        self.first_token_ms += other.first_token_ms
        self.steps += other.steps
        self.duties += other.duties

    def row(self) -> dict[str, float]:
        """The numbers of the table."""
        found = {f"gap_p{at}": percentile(self.gap_ms, at) for at in (50, 95, 99)}
        found |= {f"first_p{at}": percentile(self.first_token_ms, at) for at in (50, 95)}
        found |= {"tokens_per_s": len(self.gap_ms) / self.seconds}
        if self.duties:
            found |= {"steps_per_min": 60 * self.steps / self.seconds, "duty": fmean(self.duties)}
        return {name: round(value, 2) for name, value in found.items()}


@dataclass(frozen=True)
class Turn:
    """One cell: what was seen while nothing was learned, and during each kind of job."""

    windows: dict[str, Window]

    def ratios(self, what: str) -> dict[str, float]:
        """What learning changes, as multiples of idle."""
        idle, learning = self.windows[IDLE].row(), self.windows[what].row()
        return {name: round(learning[name] / idle[name], 3) for name in idle}


def pooled(windows: Iterable[Window]) -> Window:
    whole = Window()
    for each in windows:
        whole.add(each)
    return whole


class Readers:
    """Streams that never end; when each began, and when its tokens came."""

    def __init__(self, session: aiohttp.ClientSession, base: str, model: str) -> None:
        self._session, self._base, self._model = session, base, model
        self._seen: list[tuple[float, list[float]]] = []

    async def read(self, number: int, num_tokens: int) -> None:
        body = {"model": self._model, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        thinking = random.Random(number)
        while True:
            await asyncio.sleep(thinking.uniform(0, THINK_S))
            times: list[float] = []
            self._seen.append((time.monotonic(), times))
            asked = body | {"prompt": f"Story {number}, told by {thinking.random()}:"}
            async with self._session.post(f"{self._base}/v1/completions", json=asked) as answer:
                if answer.status != 200:
                    raise SystemExit(f"the server answered {answer.status}: {await answer.text()}")
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        times.append(time.monotonic())

    def note(self, window: Window, begun: float, end: float) -> None:
        """Add what was seen from `begun` to `end`; a gap counts where its second token came."""
        window.seconds += end - begun
        for asked, times in self._seen:
            gaps = [b - a for a, b in pairwise(times) if begun <= b < end]
            window.gap_ms += [round(1000 * gap, 1) for gap in gaps]
            if times and begun <= asked < end:
                window.first_token_ms.append(round(1000 * (times[0] - asked), 1))


async def measure(base: str, options: argparse.Namespace, duties: Iterable[float]) -> Turn:
    """One after the other, in one cell."""
    windows = {IDLE: Window()}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        model = (await _get(session, f"{base}/v1/models"))["data"][0]["id"]
        readers = Readers(session, base, model)
        async with asyncio.TaskGroup() as reading:
            tasks = [
                reading.create_task(readers.read(at, options.tokens))
                for at in range(options.streams)
            ]
            await asyncio.sleep(WARM_UP_S)
            begun = time.monotonic()
            await asyncio.sleep(options.idle)
            readers.note(windows[IDLE], begun, time.monotonic())
            for duty in duties:
                window = windows[learning_at(duty)] = Window()
                await _learn(session, base, options.learn, duty, window, readers)
            for task in tasks:
                task.cancel()
    return Turn(windows)


def learning_at(duty: float) -> str:
    return LEARNING if duty == 1 else f"{LEARNING}, duty {duty:g}"


async def _learn(
    session: aiohttp.ClientSession,
    base: str,
    seconds: float,
    duty: float,
    window: Window,
    readers: Readers,
) -> None:
    body = {"samples": [SAMPLE], "config": CONFIG | {"duty": duty}}
    async with session.post(f"{base}/train", json=body) as answer:
        job = f"{base}/train/jobs/{(await answer.json())['job_id']}"
    await asyncio.sleep(SETTLE_S)
    before, begun = (await _get(session, job))["steps"], time.monotonic()
    while time.monotonic() - begun < seconds:
        await asyncio.sleep(LOOK_S)
        window.duties.append((await _get(session, f"{base}/status"))["trainer"]["duty"])
    window.steps += (await _get(session, job))["steps"] - before
    readers.note(window, begun, time.monotonic())
    async with session.delete(job):
        pass
    while (await _get(session, job))["status"] == "training":
        await asyncio.sleep(LOOK_S)


async def _get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as answer:
        return await answer.json()


def percentile(values: Sequence[float], at: int) -> float:
    return quantiles(values, n=100, method="inclusive")[at - 1]


def table(found: dict[str, list[Turn]], budget_ms: float) -> str:
    """Markdown; in brackets, cell by cell, ratios to idle in the same one."""
    lines = [f"| budget {budget_ms:.0f} ms | {' | '.join(COLUMNS.values())} |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for name, turns in found.items():
        for what, row in rows(turns).items():
            cells = {key: f"{row[key]:.3g}" for key in COLUMNS if key in row}
            ratios = [turn.ratios(what) for turn in turns]
            for key in ratios[0] if what != IDLE else ():
                cells[key] += f" ({', '.join(f'{each[key]:.2f}' for each in ratios)})"
            lines.append(
                f"| {what}, {name} | {' | '.join(cells.get(key, '') for key in COLUMNS)} |"
            )
    return "\n".join(lines)


def rows(turns: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """Of all cells of one kind together."""
    return {what: pooled(t.windows[what] for t in turns).row() for what in turns[0].windows}


def draw(path: str, found: dict[str, list[Turn]], budget_ms: float, title: str) -> None:
    """Of gaps and first tokens, the share that is longer."""
    figure = frame.figure(10, 4.4)
    gaps, first = figure.subplots(1, 2)
    colours = {WITHOUT: "#D55E00", WITH: "#0072B2"}
    for name, turns in found.items():
        for at, what in enumerate(turns[0].windows):
            window, line = pooled(turn.windows[what] for turn in turns), LINES[at % len(LINES)]
            for axis, values in ((gaps, window.gap_ms), (first, window.first_token_ms)):
                ordered = sorted(values)
                shares = [1 - at / len(ordered) for at in range(len(ordered))]
                axis.plot(
                    ordered, shares, color=colours[name], linestyle=line, label=f"{what}, {name}"
                )
    gaps.axvline(budget_ms, color=colours[WITH], alpha=0.4)
    gaps.axhline(0.05, color=colours[WITH], alpha=0.4)
    gaps.set(xlabel="time between two tokens (ms)", ylabel="share that is longer", yscale="log")
    gaps.set(xscale="log", title="the budget is where the thin lines cross")
    # Two tokens that come in one piece are no gap that anybody sees.
    gaps.set_xlim(left=SHORTEST_DRAWN_MS)
    first.set(xlabel="time to the first token (ms)", yscale="log", xscale="log")
    for axis in (gaps, first):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    frame.draw_to(path, figure)


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--home", default="~/.reverie", help="where the default model is adopted")
    parser.add_argument("--model", default="smollm2-135m", help="a directory or hub id")
    parser.add_argument("--allow", type=float, default=0.5, help="share of what learning adds")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="of each stream")
    parser.add_argument("--rounds", type=int, default=2, help="cells of each kind")
    parser.add_argument("--idle", type=float, default=25, help="seconds without a job")
    parser.add_argument("--learn", type=float, default=40, help="seconds of a job")
    parser.add_argument(
        "--duties", nargs="*", type=float, default=[], help="further jobs, of less of the time"
    )
    parser.add_argument("--set", action="append", default=[], help="group.key=value, of each cell")
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--plot", help="write the picture to this file (needs matplotlib)")
    options = frame.begin(parser)
    directory = adopt(options.model, Path(options.home).expanduser(), None, frame.say).directory
    found: dict[str, list[Turn]] = {WITHOUT: [], WITH: []}
    budget_ms = math.nan
    for name in [WITHOUT, WITH] * options.rounds:
        settings = dict(each.split("=", 1) for each in options.set)
        settings["trainer.latency_budget_ms"] = "none" if name == WITHOUT else budget_ms
        duties = [1.0, *(options.duties if name == WITHOUT else ())]
        with running_cell(directory, settings) as base:
            turn = asyncio.run(measure(base, options, duties))
        found[name].append(turn)
        if math.isnan(budget_ms):
            alone, beside = (percentile(turn.windows[w].gap_ms, 95) for w in (IDLE, LEARNING))
            budget_ms = round(alone + options.allow * (beside - alone), 1)
        frame.say(f"{name}: {json.dumps(rows([turn]))}, of idle {turn.ratios(LEARNING)}")
    print(table(found, budget_ms))
    made = {
        "budget_ms": budget_ms,
        "rows": {name: rows(turns) for name, turns in found.items()},
        "seen": {name: [asdict(turn)["windows"] for turn in t] for name, t in found.items()},
    }
    frame.keep(options.json, options, made)
    if options.plot:
        streams = f"{options.streams} stream{'s' * (options.streams > 1)}"
        title = f"{streams} of {options.tokens} tokens, budget {budget_ms:.0f} ms"
        draw(options.plot, found, budget_ms, title)


if __name__ == "__main__":
    main()
