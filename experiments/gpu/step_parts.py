"""What a learning step is made of, and what it takes, for a model of random weights on one device.

    .venv/bin/python -m experiments.gpu.step_parts qwen3.5-27b --like ADOPTED --device cuda \\
        --ranks 1 64 256 --json step_parts.json
    .venv/bin/python -m experiments.gpu.step_parts smollm2 --like ADOPTED --context 256

The trainer's learner alone in one process, without a server: the weights are made on the device, in
bfloat16, and each rank in turn learns the same tokens after the same context. A step is split by
the device's own clock; the first ones, which compile and allocate, are left out. `state` is the
optimizer's, `step` the most that a step took beyond weights and state, and `in all` their sum:
what is left of a card is the KV cache's, vLLM's and two CUDA contexts'. A rank that does not fit is
a line that says so.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import transformers

from apollo.learning.samples import Example
from apollo.learning.step import Learner
from experiments import frame
from experiments.gpu.random_model import SEED, SHAPES

PARTS: Final = ("prefix", "forward", "backward", "optimizer")
RATE: Final = 1e-6
GB: Final = 1e9


def made_on(device: str, shape: str, like: Path) -> Any:
    torch.manual_seed(SEED)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            SHAPES[shape](like), dtype=torch.bfloat16
        )


def example(vocab_size: int, num_context: int, num_learned: int) -> Example:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocab_size, (num_context + num_learned,), generator=generator).tolist()
    return Example(tuple(ids[:num_context]), tuple(ids[num_context:]))


def run(module: Any, rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """Some steps of one rank; medians of those that count."""
    learner = Learner(
        module,
        rank=rank,
        rounding="stochastic",
        seed=SEED,
        checkpoint_layers=options.checkpoint_layers,
    )
    sample = example(module.config.vocab_size, options.context, options.learned)
    parts: dict[str, list[float]] = {name: [] for name in (*PARTS, "whole")}
    step_bytes: list[int] = []
    try:
        for index in range(options.unmeasured + options.steps):
            begun = time.perf_counter()
            report = learner.step(sample, RATE)
            if index < options.unmeasured:
                continue
            parts["whole"].append(time.perf_counter() - begun)
            for name in PARTS:
                parts[name].append(dict(report.parts).get(name, 0.0))
            step_bytes += [] if report.peak_bytes is None else [report.peak_bytes]
        state_bytes = learner.optimizer.size_bytes()
    finally:
        learner.close()
        module.zero_grad(set_to_none=True)  # Of a backward pass that found no room.
    weights_bytes = sum(each.numel() * each.element_size() for each in module.parameters())
    return {
        "rank": rank,
        "seconds": {name: median(values) for name, values in parts.items()},
        "tensors": len(report.tensors),
        "weights_bytes": weights_bytes,
        "state_bytes": state_bytes,
        "step_bytes": max(step_bytes, default=None),
    }


def rows(found: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| rank | tensors | weights, GB | state, GB | step, GB | in all, GB | "
        f"{' | '.join(f'{name}, s' for name in PARTS)} | step, s |"
    )
    yield "|---" * (7 + len(PARTS)) + "|"
    for each in found:
        if "failed" in each:
            yield f"| {each['rank']} | {each['failed']} |"
            continue
        sizes = [each[f"{name}_bytes"] for name in ("weights", "state", "step")]
        told = [f"{size / GB:.2f}" if size is not None else "-" for size in sizes]
        told.append(f"{sum(size or 0 for size in sizes) / GB:.2f}")
        told += [f"{each['seconds'][name]:.3f}" for name in (*PARTS, "whole")]
        yield f"| {each['rank']} | {each['tensors']} | {' | '.join(told)} |"


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--like", type=Path, required=True, help="whose words are used")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64], help="1 is APOLLO-Mini")
    parser.add_argument("--context", type=int, default=2048, help="tokens that are only read")
    parser.add_argument("--learned", type=int, default=64, help="tokens")
    parser.add_argument("--steps", type=int, default=5, help="that count")
    parser.add_argument("--unmeasured", type=int, default=2, help="steps before them")
    parser.add_argument("--checkpoint-layers", action="store_true", help="compute them twice")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = frame.begin(parser)
    module = made_on(options.device, options.shape, options.like)
    frame.say(f"{sum(each.numel() for each in module.parameters()) / 1e9:.2f} B parameters")
    found: list[dict[str, Any]] = []
    for rank in options.ranks:
        try:
            found.append(run(module, rank, options))
        except torch.OutOfMemoryError as error:
            found.append({"rank": rank, "failed": str(error).partition(".")[0]})
        frame.say(f"rank {rank}: {found[-1]}")
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(rows(found)))
    frame.keep(options.json, options, {"runs": found})


if __name__ == "__main__":
    main()
