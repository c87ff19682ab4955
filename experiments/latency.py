"""What answers wait for while the model learns, with and without a latency budget.

    .venv/bin/python -m experiments.latency --json latency.json --plot docs/latency.png   # 8 min
    .venv/bin/python -m experiments.latency --rounds 1 --idle 10 --learn 15

Readers ask for streams all the time, each some time after its last one. Two cells, one after the
other: in each, by turns, nothing is learned (`idle`) and a job is. The first has no budget, and
shows what learning adds to the 95th percentile of gaps between tokens; the second has one that
allows a share of that (`--allow`), so that it is neither idle nor out of reach on any machine. What
is compared are ratios to `idle` in the same cell; what the budget costs is how many steps are made.
Only one cell may run on the machine.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
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
WITHOUT, WITH = "learning, no budget", "learning, budget"
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
JOB: Final = {
    "samples": [
        {
            "messages": [
                {"role": "user", "content": "Why are there tides?"},
                {"role": "assistant", "content": ANSWER},
            ]
        }
    ],
    "config": {"epochs": 1000, "learning_rate": 1e-9},
}
"""Longer than any window, and without an effect on what is said."""


@dataclass
class Window:
    """What readers saw in all windows of one kind."""

    seconds: float = 0.0
    gap_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    steps: int = 0
    duties: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """The numbers of the table."""
        found = {f"gap_p{at}": percentile(self.gap_ms, at) for at in (50, 95, 99)}
        found |= {f"first_p{at}": percentile(self.first_token_ms, at) for at in (50, 95)}
        found |= {"tokens_per_s": len(self.gap_ms) / self.seconds}
        if self.duties:
            found |= {"steps_per_min": 60 * self.steps / self.seconds, "duty": fmean(self.duties)}
        return {name: round(value, 2) for name, value in found.items()}


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


async def measure(base: str, options: argparse.Namespace, learning: Window, idle: Window) -> None:
    """Alternate the two in one cell."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        model = (await _get(session, f"{base}/v1/models"))["data"][0]["id"]
        readers = Readers(session, base, model)
        async with asyncio.TaskGroup() as reading:
            tasks = [
                reading.create_task(readers.read(at, options.tokens))
                for at in range(options.streams)
            ]
            for _ in range(options.rounds):
                await asyncio.sleep(WARM_UP_S)
                begun = time.monotonic()
                await asyncio.sleep(options.idle)
                readers.note(idle, begun, time.monotonic())
                await _learn(session, base, options.learn, learning, readers)
            for task in tasks:
                task.cancel()


async def _learn(
    session: aiohttp.ClientSession, base: str, seconds: float, window: Window, readers: Readers
) -> None:
    async with session.post(f"{base}/train", json=JOB) as answer:
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


def table(found: dict[str, Window], budget_ms: float) -> str:
    """Markdown; in brackets, ratios to idle in the same cell."""
    lines = [f"| budget {budget_ms:.0f} ms | {' | '.join(COLUMNS.values())} |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for name, window in found.items():
        row, idle = window.row(), found[idle_of(name)].row()
        ratios = {key: f" ({row[key] / idle[key]:.2f})" for key in idle if window.duties}
        cells = [f"{row[key]:.3g}{ratios.get(key, '')}" if key in row else "" for key in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def idle_of(name: str) -> str:
    """What a kind of window is compared with: that of the same cell."""
    return "idle" + name[name.rfind(",") :]


def draw(path: str, found: dict[str, Window], budget_ms: float, title: str) -> None:
    """Of gaps and first tokens, the share that is longer."""
    figure = frame.figure(10, 4.4)
    gaps, first = figure.subplots(1, 2)
    looks = {WITHOUT: ("#D55E00", "--"), WITH: ("#0072B2", "-")}
    for name, window in found.items():
        colour, line = looks.get(name, ("#999999", ":" if name.endswith("no budget") else "-."))
        for axis, values in ((gaps, window.gap_ms), (first, window.first_token_ms)):
            ordered = sorted(values)
            shares = [1 - at / len(ordered) for at in range(len(ordered))]
            axis.plot(ordered, shares, color=colour, linestyle=line, label=name)
    gaps.axvline(budget_ms, color="#0072B2", alpha=0.4)
    gaps.axhline(0.05, color="#0072B2", alpha=0.4)
    gaps.set(xlabel="time between two tokens (ms)", ylabel="share that is longer", yscale="log")
    gaps.set(xscale="log", title="the budget is where the thin lines cross")
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
    parser.add_argument("--rounds", type=int, default=2, help="of idle and learning, in each cell")
    parser.add_argument("--idle", type=float, default=25, help="seconds without a job")
    parser.add_argument("--learn", type=float, default=40, help="seconds of a job")
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--plot", help="write the picture to this file (needs matplotlib)")
    options = frame.begin(parser)
    directory = adopt(options.model, Path(options.home).expanduser(), None, frame.say).directory
    found: dict[str, Window] = {}
    budget_ms: float | None = None
    for name in (WITHOUT, WITH):
        idle = found[idle_of(name)] = Window()
        learning = found[name] = Window()
        setting = {"trainer.latency_budget_ms": "none" if budget_ms is None else budget_ms}
        with running_cell(directory, setting) as base:
            asyncio.run(measure(base, options, learning, idle))
        if budget_ms is None:
            alone, beside = percentile(idle.gap_ms, 95), percentile(learning.gap_ms, 95)
            budget_ms = round(alone + options.allow * (beside - alone), 1)
        frame.say(f"{name}: {json.dumps(learning.row())}, idle {json.dumps(idle.row())}")
    assert budget_ms is not None
    print(table(found, budget_ms))
    rows = {name: window.row() for name, window in found.items()}
    seen = {name: asdict(window) for name, window in found.items()}
    frame.keep(options.json, options, {"budget_ms": budget_ms, "rows": rows, "seen": seen})
    if options.plot:
        title = f"{options.streams} streams of {options.tokens} tokens, budget {budget_ms:.0f} ms"
        draw(options.plot, found, budget_ms, title)


if __name__ == "__main__":
    main()
