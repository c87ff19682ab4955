"""What reading a context, instead of learning from it, saves and costs.

    .venv/bin/python -m experiments.context_frozen --plot docs/context_frozen.png
    RAY_AUTH_MODE=token ray job submit --working-dir . -- \\
        python -m experiments.context_frozen --json /tmp/context.json

Three questions, on the default model in one process, without a server:

    time and memory   forward and backward of 64 learned tokens after contexts of 256 to 4096, with
                      the whole sequence in the graph and with the context read only; rounds of the
                      two alternate, so that the machine's noise falls on both
    direction         cosine of the frozen gradient to the full one, by kind of module, on passages
                      of text that ship with Python
    grad_context      the same cosine as more of the context's end enters the graph

Gradients are released as they come, as in the product, so that memory is that of activations.
"""

import ctypes
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from apollo.learning.budget import estimate_memory, measured_peak
from apollo.learning.forward import Reader, check_prefix
from apollo.learning.loss import cross_entropy
from apollo.weights.adopt import adopt
from experiments import frame

CONTEXTS: Final = (256, 512, 1024, 2048, 4096)
NUM_LEARNED: Final = 64
GRAD_CONTEXTS: Final = (0, 16, 64, 256)
COSINE_CONTEXT: Final = 512
KINDS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm")
MIB: Final = 2**20


@contextmanager
def released(module: Any) -> Iterator[None]:
    """Drop every gradient as soon as it is complete."""

    def drop(param: Tensor) -> None:
        param.grad = None

    trained = [param for param in module.parameters() if param.requires_grad]
    handles = [param.register_post_accumulate_grad_hook(drop) for param in trained]
    yield
    for handle in handles:
        handle.remove()


def one_pass(module: Any, ids: list[int], grad_context: int) -> dict[str, float]:
    """Seconds of the forward (prefix included) and backward pass, and the peak memory, in MiB."""
    context, learned = ids[:-NUM_LEARNED], ids[-NUM_LEARNED:]
    if module.device.type == "cpu":  # What an earlier pass freed must not count as there already.
        ctypes.CDLL(None).malloc_trim(0)
    begun = time.perf_counter()
    with measured_peak(module.device) as peak:
        reader = Reader(module, context, grad_context, NUM_LEARNED)
        prefix_s = time.perf_counter() - begun
        loss = cross_entropy(reader.logprobs(learned))
        loss.item()
        forward_s = time.perf_counter() - begun
        loss.backward()
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        total_s = time.perf_counter() - begun
    estimate = estimate_memory(module, len(ids) - reader.num_read, reader.num_read, False)
    return {
        "prefix_s": prefix_s,
        "forward_s": forward_s,
        "total_s": total_s,
        "peak_mib": peak[0] / MIB if peak else float("nan"),
        "estimate_mib": estimate.total / MIB,
    }


def measure_costs(module: Any, ids: list[int], contexts: list[int], rounds: int) -> list[Any]:
    """One row per context: medians over rounds, full against frozen."""
    rows = []
    with released(module):
        one_pass(module, ids[: 64 + NUM_LEARNED], 64)  # Pages of the weights come in.
        for context in contexts:
            seen: dict[str, list[dict[str, float]]] = defaultdict(list)
            for _ in range(rounds):
                for way, grad_context in (("full", context), ("frozen", 0)):
                    cut = ids[: context + NUM_LEARNED]
                    seen[way].append(one_pass(module, cut, grad_context))
            row: dict[str, Any] = {"context": context}
            for way, passes in seen.items():
                for key in passes[0]:
                    row[f"{way}_{key}"] = median(one[key] for one in passes)
            row["speedup"] = row["full_total_s"] / row["frozen_total_s"]
            row["memory_ratio"] = row["full_peak_mib"] / row["frozen_peak_mib"]
            rows.append(row)
            frame.say(
                f"context {context}: {row['full_total_s']:.2f} s against "
                f"{row['frozen_total_s']:.2f} s, {row['full_peak_mib']:.0f} MiB against "
                f"{row['frozen_peak_mib']:.0f} MiB"
            )
    return rows


def gradient(module: Any, ids: list[int], grad_context: int) -> dict[str, Tensor]:
    reader = Reader(module, ids[:-NUM_LEARNED], grad_context, NUM_LEARNED)
    cross_entropy(reader.logprobs(ids[-NUM_LEARNED:])).backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def cosines(full: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Cosine of the concatenated gradients of each kind of module, and of all."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name, one in full.items():
        two = other[name]
        products = [(a * b).sum().item() for a, b in ((one, two), (one, one), (two, two))]
        for kind in (next((kind for kind in KINDS if kind in name), "other"), "all"):
            sums[kind] = [have + new for have, new in zip(sums[kind], products, strict=True)]
    return {kind: dot / (one * two) ** 0.5 for kind, (dot, one, two) in sums.items()}


def measure_directions(module: Any, passages: list[list[int]]) -> dict[str, dict[str, float]]:
    """Mean cosine to the full gradient by kind of module, for each grad_context."""
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, ids in enumerate(passages, 1):
        full = gradient(module, ids, len(ids))
        for way in ("no context", *GRAD_CONTEXTS):
            if way == "no context":
                found = gradient(module, ids[-NUM_LEARNED - 5 :], 5)
            else:
                found = gradient(module, ids, int(way))
            for kind, value in cosines(full, found).items():
                seen[str(way)][kind].append(value)
        frame.say(f"passage {number} of {len(passages)}")
    return {
        way: {kind: fmean(values) for kind, values in kinds.items()} for way, kinds in seen.items()
    }


def text_passages(tokenizer: Any, num_passages: int, length: int) -> list[list[int]]:
    """Docstrings and code of large modules of the standard library, as token ids."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(stdlib.glob("*.py"), key=lambda path: -path.stat().st_size)
    tokenised = (tokenizer(path.read_text(errors="ignore"))["input_ids"] for path in files)
    return [ids[:length] for ids in tokenised if len(ids) >= length][:num_passages]


def table(rows: list[Any], directions: dict[str, dict[str, float]]) -> str:
    lines = [
        "| context | full | frozen | faster | full memory | frozen memory | less | estimated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['context']} | {row['full_total_s']:.2f} s | {row['frozen_total_s']:.2f} s | "
            f"{row['speedup']:.1f}x | {row['full_peak_mib']:.0f} MiB | "
            f"{row['frozen_peak_mib']:.0f} MiB | {row['memory_ratio']:.1f}x | "
            f"{row['full_estimate_mib']:.0f} / {row['frozen_estimate_mib']:.0f} MiB |"
        )
    kinds = ["all", *KINDS]
    lines += ["", f"| grad_context | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for way, values in directions.items():
        cells = " | ".join(f"{values.get(kind, float('nan')):.2f}" for kind in kinds)
        lines.append(f"| {way} | {cells} |")
    return "\n".join(lines)


def draw(path: str, rows: list[Any], directions: dict[str, dict[str, float]]) -> None:
    """Time and memory by length of the context, and the cosine by how much of it is learned."""
    figure = frame.figure(13, 4.2)
    left, middle, right = figure.subplots(1, 3)
    contexts = [row["context"] for row in rows]
    for axes, key, unit in ((left, "total_s", "seconds"), (middle, "peak_mib", "MiB")):
        for way, colour, mark in (("full", "#D55E00", "o"), ("frozen", "#0072B2", "s")):
            values = [row[f"{way}_{key}"] for row in rows]
            axes.plot(contexts, values, color=colour, marker=mark, label=f"context {way}")
        axes.set(xlabel="context tokens", ylabel=unit)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(contexts, [str(context) for context in contexts])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_title(f"One step, {NUM_LEARNED} learned tokens")
    middle.set_title("Memory beside the weights")
    colours = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
    shown = ("all", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    for kind, colour in zip(shown, colours, strict=True):
        values = [directions[way][kind] for way in directions]
        right.plot(list(directions), values, marker="o", color=colour, label=kind)
    right.set(xlabel="grad_context", ylabel="cosine to the full gradient", ylim=(0, 1.02))
    right.set_title(f"Direction, context of {COSINE_CONTEXT}")
    right.grid(alpha=0.3)
    right.legend(fontsize=8, ncols=2)
    frame.draw_to(path, figure)


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--home", default="~/.reverie", help="where the default model is adopted")
    parser.add_argument("--model", default="smollm2-135m", help="a directory or hub id")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--longest", type=int, default=max(CONTEXTS), help="longest context")
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--plot", help="write the picture to this file (needs matplotlib)")
    arguments = frame.begin(parser)
    directory = adopt(arguments.model, Path(arguments.home), None, print).directory
    module: Any = AutoModelForCausalLM.from_pretrained(directory).to(arguments.device).train()
    module.get_input_embeddings().requires_grad_(False)
    check_prefix(module)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    contexts = [context for context in CONTEXTS if context <= arguments.longest]
    (ids,) = text_passages(tokenizer, 1, max(contexts) + NUM_LEARNED)
    passages = text_passages(tokenizer, arguments.passages, COSINE_CONTEXT + NUM_LEARNED)
    directions = measure_directions(module, passages)
    rows = measure_costs(module, ids, contexts, arguments.rounds)
    print(table(rows, directions))
    frame.keep(arguments.json, arguments, {"costs": rows, "directions": directions})
    if arguments.plot:
        draw(arguments.plot, rows, directions)


if __name__ == "__main__":
    main()
