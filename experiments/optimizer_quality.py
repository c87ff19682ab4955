"""How well APOLLO, SCALE, AdamW and SGD learn: one small language model from scratch, same budget.

    .venv/bin/python -m experiments.optimizer_quality --out runs.jsonl --plot optimizer_quality.png
    RAY_AUTH_MODE=token ray job submit --working-dir . -- \\
        python -m experiments.optimizer_quality --out /tmp/runs.jsonl

A Llama of 0.8 M weights reads the sources of Python's standard library, byte by byte; every tenth
file is held out. For each method the learning rate is tuned on one seed, by walking a 1-2-5 ladder
until both neighbours of the best are worse; then further seeds run at the best. With the same seed
every method starts from the same weights and sees the same bytes in the same order. A finished run
is a line in `--out`, and is not repeated: a killed experiment goes on where it was.
"""

import math
import platform
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.optim import SGD, AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from apollo.optim.optimizer import Apollo
from experiments import frame

HIDDEN, LAYERS, SEQUENCE, BATCH = 128, 4, 128, 8
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; a half cosine brings it to zero."""
BETAS = (0.9, 0.99)
HELD_OUT_SEQUENCES, LOOKS = 128, 10
"""Sequences of every measurement, and measurements of a run."""
SKIPPED = {"site-packages", "test", "tests", "encodings"}
"""Not the library's own sources, or tables."""
TUNING_SEED = 0
LADDER: Final = tuple(digit * 10.0**power for power in range(-5, 3) for digit in (1, 2, 5))

Make = Callable[[Module, float], Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer, where its tuning begins, and its look: colours of Okabe and Ito."""

    make: Make
    first_lr: float
    colour: str
    line: str


def apollo(**settings: Any) -> Make:
    return lambda model, lr: Apollo(model.named_parameters(), lr, betas=BETAS, **settings)


def torchs(kind: Callable[..., Optimizer], **settings: Any) -> Make:
    return lambda model, lr: kind(model.parameters(), lr=lr, **settings)


METHODS: Final = {
    "SGD": Method(torchs(SGD), 0.5, "#999999", "-"),
    "SGD, momentum 0.9": Method(torchs(SGD, momentum=0.9), 0.05, "#999999", "--"),
    "AdamW": Method(torchs(AdamW, betas=BETAS, weight_decay=0.0), 5e-3, "#000000", "-"),
    f"APOLLO, rank {HIDDEN // 4}": Method(apollo(rank=HIDDEN // 4), 5e-3, "#0072B2", "-"),
    f"APOLLO, rank {HIDDEN // 8}": Method(apollo(rank=HIDDEN // 8), 5e-3, "#56B4E9", "--"),
    "APOLLO-Mini (rank 1)": Method(apollo(rank=1), 5e-3, "#D55E00", "-."),
    "SCALE": Method(apollo(mode="scale"), 5e-3, "#009E73", ":"),
}


@dataclass(frozen=True)
class Run:
    """One finished training run; a line of the output."""

    setting: str
    """Budget, model and text; runs of another setting are not looked at."""
    method: str
    lr: float
    seed: int
    losses: list[tuple[int, float | None]]
    """Steps made, and held-out loss in nats per byte; None where it is not finite."""
    state_bytes: int
    held_bytes: int  # The state, and projections.
    seconds: float

    @property
    def loss(self) -> float:
        """At the end; infinite after divergence."""
        last = self.losses[-1][1]
        return math.inf if last is None else last


def read_text() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's sources: to learn, and held out (every tenth file)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not SKIPPED & {*f.relative_to(root).parts}]
    held_out = files[5::10]
    learned = [file for file in files if file not in set(held_out)]
    texts = [b"\n".join(file.read_bytes() for file in part) for part in (learned, held_out)]
    first, second = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)
    return first, second


def make_model(seed: int) -> Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "hidden_size": HIDDEN, "intermediate_size": HIDDEN * 11 // 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=SEQUENCE, use_cache=False)
    assert not config.tie_word_embeddings  # The head is a tensor of its own.
    return cast(Module, LlamaForCausalLM(config))


def loss_of(model: Module, text: Tensor, starts: Tensor) -> Tensor:
    """Mean nats per byte of the sequences that begin at `starts`."""
    tokens = text[starts[:, None] + torch.arange(SEQUENCE + 1)].long()
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Module, text: Tensor) -> float | None:
    """The same sequences, evenly spread over the text, for every run; None if not finite."""
    starts = torch.linspace(0, len(text) - SEQUENCE - 1, HELD_OUT_SEQUENCES).long()
    loss = fmean(loss_of(model, text, part).item() for part in starts.split(32))
    return loss if math.isfinite(loss) else None


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak in `step`, counted from 0."""
    warm_up = max(1, round(WARM_UP * steps))
    fallen = max(0, step - warm_up) / max(1, steps - warm_up)
    return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * fallen))


def train(
    setting: str, name: str, lr: float, seed: int, steps: int, texts: tuple[Tensor, Tensor]
) -> Run:
    """One run; ends early if the held-out loss is not finite."""
    begun = time.perf_counter()
    learned, held_out = texts
    model = make_model(seed)
    optimizer = METHODS[name].make(model, lr)
    order = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(learned) - SEQUENCE, (steps, BATCH), generator=order)
    looks = [round(steps * share / LOOKS) for share in range(1, LOOKS + 1)]
    losses = [(0, held_out_loss(model, held_out))]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate(step, steps)
        optimizer.zero_grad()
        loss_of(model, learned, starts[step]).backward()
        optimizer.step()
        if step + 1 in looks:
            losses.append((step + 1, held_out_loss(model, held_out)))
            if losses[-1][1] is None:
                losses += [(look, None) for look in looks if look > step + 1]
                break
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    state = sum(value.nbytes for value in tensors if isinstance(value, Tensor))
    held = optimizer.size_bytes() if isinstance(optimizer, Apollo) else state
    seconds = round(time.perf_counter() - begun, 1)
    return Run(setting, name, lr, seed, losses, state, held, seconds)


class Book:
    """The runs made so far, in a file; makes those that are missing."""

    def __init__(self, path: Path, steps: int) -> None:
        self._texts = read_text()
        sizes = "+".join(str(len(text)) for text in self._texts)
        self.setting = (
            f"{LAYERS} layers of {HIDDEN}, {steps} steps of {BATCH} x {SEQUENCE} bytes, "
            f"text {sizes} bytes of Python {platform.python_version()}"
        )
        self.steps = steps
        self._finished = frame.Finished(path)
        runs = [Run(**row) for row in self._finished.rows]
        self._runs = {(r.method, r.lr, r.seed): r for r in runs if r.setting == self.setting}

    def run(self, name: str, lr: float, seed: int, num_left: int) -> Run:
        """The run, made now if it is not in the file; `num_left` is the least still to come."""
        key = name, lr, seed
        if key not in self._runs:
            run = train(self.setting, name, lr, seed, self.steps, self._texts)
            self._finished.add(asdict(run))
            self._runs[key] = run
            left = num_left * fmean(r.seconds for r in self._runs.values()) / 60
            what = f"{name:<22} lr {lr:<7.3g} seed {seed}: {run.loss:.4f} nats/byte"
            frame.say(f"{what}, {run.seconds:.0f} s; at least {left:.0f} min left")
        return self._runs[key]

    def tune(self, name: str, num_later: int) -> list[Run]:
        """Runs of consecutive learning rates, the best not at an end unless the ladder ends."""
        first = LADDER.index(METHODS[name].first_lr)
        runs = {first: self.run(name, LADDER[first], TUNING_SEED, num_later + 2)}
        while True:
            best = min(runs, key=lambda at: runs[at].loss)
            missing = {best - 1, best + 1} & set(range(len(LADDER))) - set(runs)
            if not missing:
                return [runs[at] for at in sorted(runs)]
            at = max(missing)
            runs[at] = self.run(name, LADDER[at], TUNING_SEED, num_later + len(missing) - 1)


def make_runs(book: Book, num_seeds: int) -> tuple[dict[str, list[Run]], dict[str, list[Run]]]:
    """By method: the runs of the tuning, and those at its best learning rate."""
    tuned: dict[str, list[Run]] = {}
    final: dict[str, list[Run]] = {}
    for number, name in enumerate(METHODS):
        num_later = (len(METHODS) - number - 1) * (num_seeds + 3) + num_seeds
        tuned[name] = book.tune(name, num_later)
        lr = min(tuned[name], key=lambda run: run.loss).lr
        seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + num_seeds)
        final[name] = [book.run(name, lr, seed, num_later - seed) for seed in seeds]
    return tuned, final


def show(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation, where there is one."""
    can_spread = len(values) > 1 and all(map(math.isfinite, values))
    return f"{fmean(values):{form}}" + (f" +- {stdev(values):.4f}" if can_spread else "")


def table(tuned: dict[str, list[Run]], final: dict[str, list[Run]]) -> str:
    """Markdown; losses as mean and standard deviation over seeds."""
    lines = [
        "| method | peak lr (tried) | best inside | held-out nats/byte | perplexity/byte "
        "| minus AdamW, same seed | state KiB | with projections |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in final.items():
        rates, losses = [run.lr for run in tuned[name]], [run.loss for run in runs]
        over = [run.loss - other.loss for run, other in zip(runs, final["AdamW"], strict=True)]
        inside = "yes" if rates[0] < runs[0].lr < rates[-1] else "no"
        lines.append(
            f"| {name} | {runs[0].lr:g} ({rates[0]:g} to {rates[-1]:g}) | {inside} "
            f"| {show(losses, '.4f')} | {math.exp(fmean(losses)):.3f} | {show(over, '+.4f')} "
            f"| {runs[0].state_bytes / 1024:.0f} | {runs[0].held_bytes / 1024:.0f} |"
        )
    return "\n".join(lines)


def draw(path: str, tuned: dict[str, list[Run]], final: dict[str, list[Run]]) -> None:
    """Left: held-out loss while training. Right: what the learning rate does to its end."""
    figure = frame.figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    for name, method in METHODS.items():
        look = {"color": method.colour, "linestyle": method.line, "linewidth": 1.8}
        points = list(zip(*(run.losses[1:] for run in final[name]), strict=True))
        kilobytes = [point[0][0] * BATCH * SEQUENCE / 1000 for point in points]
        seeds = [[math.nan if loss is None else loss for _, loss in point] for point in points]
        left.plot(kilobytes, [fmean(losses) for losses in seeds], label=name, **look)
        lows, highs = [min(losses) for losses in seeds], [max(losses) for losses in seeds]
        left.fill_between(kilobytes, lows, highs, color=method.colour, alpha=0.15, linewidth=0)
        rates, ends = [run.lr for run in tuned[name]], [run.loss for run in tuned[name]]
        right.plot(rates, ends, marker="o", markersize=4, label=name, **look)
    left.set(xlabel="text seen (kB)", ylabel="held-out loss (nats per byte)")
    left.set_title(f"Best learning rate, {len(final['AdamW'])} seeds: mean, lowest to highest")
    right.set(xlabel="peak learning rate", ylabel="held-out loss at the end", xscale="log")
    right.set_title(f"Tuning (seed {TUNING_SEED})")
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    frame.draw_to(path, figure)


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method when tuned")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of each run")
    parser.add_argument("--out", default="optimizer_quality.jsonl", help="finished runs, appended")
    parser.add_argument("--plot", help="write the picture to this file (needs matplotlib)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = frame.begin(parser)
    book = Book(Path(arguments.out), arguments.steps)
    frame.say(book.setting)
    tuned, final = make_runs(book, arguments.seeds)
    print(table(tuned, final))
    if arguments.plot:
        draw(arguments.plot, tuned, final)


if __name__ == "__main__":
    main()
