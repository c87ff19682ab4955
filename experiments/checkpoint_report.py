"""The tables and the picture of `checkpoint_bench`: what was measured, and which aim it meets."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from experiments import frame

NUM_WORDS_OF_27B: Final = 27e9
MAX_OVER_ENTROPY: Final = 1.3
MIN_ENCODED_MB_S: Final = 300.0
MIN_PUBLISH_SHARE: Final = 0.8
MAX_COPY_S: Final = 1.0
"""For 10 GB."""
COLORS: Final = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#E69F00")


@dataclass
class Case:
    """What was measured of one kind of weights, one rate and one number of steps."""

    kind: str
    rate: float
    steps: int
    num_words: int = 0
    num_trained: int = 0
    num_changed: int = 0
    optimizer_bytes: int = 0
    """Of its state; a commit is measured without."""
    file_bytes: int = 0
    """Of the weights as safetensors writes them."""
    commit_bytes: int = 0
    deltas_bytes: int = 0
    """Of a commit, without the index and the hashes of chunks."""
    entropy_bytes: float = 0.0
    num_symbols: int = 0
    """Different steps that the entropy's coders would have to know, over all chunks."""
    blocks_bytes: int = 0
    encoded_bytes: int = 0
    """Of the chunks that changed."""
    num_chunks: int = 0
    num_dense: int = 0
    times: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each repetition."""

    @property
    def key(self) -> tuple[str, float, int]:
        return self.kind, self.rate, self.steps

    def add(self, times: dict[str, float]) -> None:
        """Of one more round."""
        for name, taken in times.items():
            self.times.setdefault(name, []).append(taken)

    def typical(self, name: str) -> float:
        return median(self.times[name])

    def fastest(self, name: str) -> float:
        return min(self.times[name])

    def ratio(self, name: str, other: str) -> float:
        """Of two times of the same round, the median."""
        return median(a / b for a, b in zip(self.times[name], self.times[other], strict=True))

    def encoded_mb_s(self, *names: str) -> float:
        return self.encoded_bytes / 1e6 / sum(self.fastest(name) for name in names)

    @property
    def copy_s_per_10_gb(self) -> float:
        return self.fastest("copy_s") / self.file_bytes * 10e9


Column = tuple[str, Callable[[Case], str]]


def table(cases: Iterable[Case], columns: list[Column]) -> str:
    lines = ["| " + " | ".join(["case", *(name for name, _ in columns)]) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for case in cases:
        cells = [f"{case.kind}, {case.rate:g}, {case.steps}", *(each(case) for _, each in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SIZES: Final[list[Column]] = [
    ("words changed, of the trained %", lambda c: f"{c.num_changed / c.num_trained:.2%}"),
    ("save_file MB", lambda c: f"{c.file_bytes / 1e6:.1f}"),
    ("4 KiB blocks MB", lambda c: f"{c.blocks_bytes / 1e6:.1f}"),
    ("commit MB", lambda c: f"{c.commit_bytes / 1e6:.2f}"),
    ("of the model %", lambda c: f"{c.commit_bytes / c.file_bytes:.2%}"),
    ("entropy MB", lambda c: f"{c.entropy_bytes / 1e6:.2f}"),
    ("x entropy", lambda c: f"{c.commit_bytes / c.entropy_bytes:.2f}"),
    ("27 B: commit GB", lambda c: f"{c.commit_bytes * scale(c.num_trained) / 1e9:.2f}"),
]
TIMES: Final[list[Column]] = [
    ("commit s", lambda c: f"{c.typical('commit_s'):.2f}"),
    ("publish s", lambda c: f"{c.typical('publish_s'):.2f}"),
    ("save_file s", lambda c: f"{c.typical('save_s'):.2f}"),
    ("blocks s", lambda c: f"{c.typical('blocks_s'):.2f}"),
    ("raw MB/s", lambda c: f"{c.file_bytes / 1e6 / c.typical('raw_s'):.0f}"),
    ("raw again MB/s", lambda c: f"{c.file_bytes / 1e6 / c.typical('again_s'):.0f}"),
    ("publish / raw", lambda c: f"{c.ratio('raw_s', 'publish_s'):.0%}"),
    ("publish / again", lambda c: f"{c.ratio('again_s', 'publish_s'):.0%}"),
    ("save_file / raw", lambda c: f"{c.ratio('raw_s', 'save_s'):.0%}"),
    ("27 B: commit s", lambda c: f"{c.typical('commit_s') * scale(c.num_trained):.0f}"),
    ("27 B: publish s", lambda c: f"{c.typical('publish_s') * scale(c.num_words):.0f}"),
]
PARTS: Final[list[Column]] = [
    ("chunks, dense", lambda c: f"{c.num_chunks}, {c.num_dense}"),
    ("hash + encode MB/s", lambda c: f"{c.encoded_mb_s('hash_s', 'encode_s'):.0f}"),
    ("encode MB/s", lambda c: f"{c.encoded_mb_s('encode_s'):.0f}"),
    ("hash s", lambda c: f"{c.fastest('hash_s'):.2f}"),
    ("diff s", lambda c: f"{c.fastest('encode_s') - c.fastest('compress_s'):.2f}"),
    ("compress s", lambda c: f"{c.fastest('compress_s'):.2f}"),
    ("copy s per 10 GB", lambda c: f"{c.copy_s_per_10_gb:.2f}"),
    ("optimizer MB", lambda c: f"{c.optimizer_bytes / 1e6:.0f}"),
]


def scale(num_words: int) -> float:
    return NUM_WORDS_OF_27B / num_words


def report(cases: list[Case]) -> str:
    """Markdown: what is written, how long it takes, where the time of encoding goes, the aims."""
    if not cases:
        return "nothing was measured"
    frozen = 1 - cases[0].num_trained / cases[0].num_words
    notes = (
        f"{cases[0].num_words / 1e6:.1f} million words, {frozen:.1%} of them frozen: those cost a "
        "commit a hash. 27 B is arithmetic: a commit's bytes and seconds for each trained word, as "
        "if all were trained; a publish's for each word. Seconds of the disk are medians, ratios "
        "medians of ratios within a round; encoding and copying are the fastest repetition."
    )
    tables = [table(cases, columns) for columns in (SIZES, TIMES, PARTS)]
    return "\n\n".join([*tables, notes, "\n".join(aims(cases))])


Aim = tuple[str, Callable[[Case], float], Callable[[float], bool]]
AIMS: Final[list[Aim]] = [
    (
        f"a commit is at most {MAX_OVER_ENTROPY}x the entropy of its steps",
        lambda c: c.commit_bytes / c.entropy_bytes,
        lambda value: value <= MAX_OVER_ENTROPY,
    ),
    (
        f"encoding and hashing take at least {MIN_ENCODED_MB_S:.0f} MB/s on one core",
        lambda c: c.encoded_mb_s("hash_s", "encode_s"),
        lambda value: value >= MIN_ENCODED_MB_S,
    ),
    (
        f"a publish has at least {MIN_PUBLISH_SHARE} of the raw bandwidth, into a new file",
        lambda c: c.ratio("raw_s", "publish_s"),
        lambda value: value >= MIN_PUBLISH_SHARE,
    ),
    (
        f"a publish has at least {MIN_PUBLISH_SHARE} of it, over a file written just before",
        lambda c: c.ratio("again_s", "publish_s"),
        lambda value: value >= MIN_PUBLISH_SHARE,
    ),
    (
        f"a copy of 10 GB takes less than {MAX_COPY_S:.0f} s",
        lambda c: c.copy_s_per_10_gb,
        lambda value: value < MAX_COPY_S,
    ),
]


def aims(cases: list[Case]) -> list[str]:
    """A line for each aim, with the cases that miss it."""
    found = []
    for name, of, is_met in AIMS:
        values = {f"{c.kind} {c.rate:g} {c.steps}": of(c) for c in cases}
        missed = [f"{case}: {value:.2f}" for case, value in values.items() if not is_met(value)]
        span = f"{min(values.values()):.2f} to {max(values.values()):.2f}"
        verdict = f"missed in {len(missed)} of {len(cases)} cases" if missed else "met in all cases"
        found.append(f"- {name}: {verdict}; {span}. {', '.join(missed)}".rstrip())
    return found


def draw(path: str, cases: list[Case]) -> None:
    """One panel a kind: bytes of a commit over its steps, a color for each rate."""
    kinds = list(dict.fromkeys(case.kind for case in cases))
    rates = sorted({case.rate for case in cases})
    figure = frame.figure(12, 5)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for rate, color in zip(rates, COLORS, strict=False):
            some = [case for case in cases if (case.kind, case.rate) == (kind, rate)]
            steps = [case.steps for case in some]
            for label, style, sizes in (
                ("commit", "o-", [case.commit_bytes for case in some]),
                ("entropy", "--", [case.entropy_bytes for case in some]),
                ("4 KiB blocks", ":", [case.blocks_bytes for case in some]),
            ):
                shares = [s / c.file_bytes * 100 for s, c in zip(sizes, some, strict=True)]
                axes.plot(steps, shares, style, color=color, label=f"{label}, rate {rate:g}")
        axes.axhline(100, color="#000000", lw=1, label="save_file")
        axes.set(title=kind, xlabel="steps between commits", xscale="log", yscale="log")
        axes.set_xticks(sorted({case.steps for case in cases}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("bytes written, % of the weights")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    frame.draw_to(path, figure)
