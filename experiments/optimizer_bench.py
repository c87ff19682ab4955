"""What a step costs: APOLLO, AdamW and plain SGD against what memory and matrix units can do.

    .venv/bin/python -m experiments.optimizer_bench --json bench.json --plot optimizer_bench.png
    .venv/bin/python -m experiments.optimizer_bench --device cuda --dtype bfloat16 --kernels triton
    RAY_AUTH_MODE=token ray job submit --working-dir . -- \\
        python -m experiments.optimizer_bench --kernels compiled

Tensors have the shapes of real models and random contents. Steps, and the limits that they are held
against, take turns in the same rounds, so that the machine's noise falls on all of them:

    bandwidth floor   bytes that a step must move / the best rate of a copy or a fused baseline
    matmul floor      operations of P G / the best rate of that product alone, at any rank

A step reads each operand and writes each result at least once; APOLLO, whose limits need the whole
gradient first, reads one that exceeds the last cache twice. The first step, with its compilation
and projections (drawn once in 200 steps), is not in the times. Linux only.
"""

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final

import psutil
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from apollo.optim.choose import KernelChoice, choose_kernels
from apollo.optim.optimizer import Apollo
from apollo.optim.projection import draw_projection
from apollo.optim.routing import Plan, make_plan
from experiments import frame

KERNELS: Final[tuple[KernelChoice, ...]] = ("eager", "compiled", "triton")
RANKS = (1, 64, 256)
LR = 1e-6
COPIED_BYTES = 1 << 28
STREAMS = ("copy", "SGD, fused", "AdamW, fused")  # Tasks that only move bytes.
SHARE_OF_MEMORY = 0.8

Shape = tuple[int, ...]
SQUARE, KEY, UP, DOWN, NORM = (576, 576), (192, 576), (1536, 576), (576, 1536), (576,)
SMOLLM_LAYER: Final[tuple[Shape, ...]] = (SQUARE, SQUARE, KEY, KEY, UP, UP, DOWN, NORM, NORM)
WORKLOADS: Final[dict[str, dict[str, Shape]]] = {
    "SmolLM2-135M, 30 layers": {
        f"{layer}.{place}": s for layer in range(30) for place, s in enumerate(SMOLLM_LAYER)
    },
    "Qwen3.5-27B, one of each shape": {
        "q_proj, gated": (12288, 5120),
        "k_proj, v_proj": (1024, 5120),
        "o_proj, out_proj": (5120, 6144),
        "in_proj_qkv": (10240, 5120),
        "in_proj_z": (6144, 5120),
        "in_proj_a, in_proj_b": (48, 5120),
        "gate_proj, up_proj": (17408, 5120),
        "down_proj": (5120, 17408),
        "lm_head, embed_tokens": (248320, 5120),
    },
}


@dataclass(frozen=True)
class Task:
    """Something that is timed: a step, or a limit."""

    name: str
    run: Callable[[], object]
    moved_bytes: int  # That it must move.
    flops: int = 0  # Of the products P G.
    optimizer: Optimizer | None = None


@dataclass
class Row:
    """What was measured of one task."""

    name: str
    moved_bytes: int
    flops: int
    first_s: float
    median_s: float
    min_s: float
    state_bytes: int  # Moments and projections.
    peak_bytes: int  # Beside what is held before the step, at its worst moment.
    bandwidth_floor_s: float = 0.0
    matmul_floor_s: float = 0.0


def make_tasks(
    shapes: dict[str, Shape],
    device: torch.device,
    dtype: torch.dtype,
    kernels: Iterable[KernelChoice],
) -> list[Task]:
    """Limits, baselines and APOLLO, over the same weights and gradients."""
    named = {}
    for name, shape in shapes.items():
        named[name] = Parameter(torch.randn(shape, device=device).mul_(0.02).to(dtype))
        named[name].grad = torch.randn(shape, device=device).mul_(1e-3).to(dtype)
    params, size_bytes = [*named.values()], sum(param.nbytes for param in named.values())
    source, target = torch.zeros(2, COPIED_BYTES, dtype=torch.uint8, device=device)
    tasks = [Task("copy", lambda: target.copy_(source), 2 * COPIED_BYTES)]
    for name, moved, optimizer in (
        ("SGD, fused", 3 * size_bytes, SGD(params, LR, fused=True)),
        ("AdamW, foreach", 7 * size_bytes, AdamW(params, LR, foreach=True)),
        ("AdamW, fused", 7 * size_bytes, AdamW(params, LR, fused=True)),
    ):
        tasks.append(Task(name, optimizer.step, moved, optimizer=optimizer))
    cache = cache_bytes(device)
    for rank in RANKS:
        for name in kernels:
            apollo = Apollo(named.items(), LR, rank=rank, kernels=choose_kernels(name, device))
            group, is_rounded = apollo.param_groups[0], dtype != torch.float32
            plans = [make_plan(n, tuple(p.shape), is_rounded, group) for n, p in named.items()]
            moved = sum(moved_bytes(plan, dtype.itemsize, cache) for plan in plans)
            flops = sum(2 * plan.rank * plan.rows * plan.columns for plan in plans)
            tasks.append(Task(f"APOLLO, rank {rank}, {name}", apollo.step, moved, flops, apollo))
        tasks.append(Task(f"P G, rank {rank}", products(plans, params), 0, flops))
    return tasks


def products(plans: list[Plan], params: list[Parameter]) -> Callable[[], object]:
    """P G of every matrix that is projected, and nothing else, in the type of the weights."""
    pairs = []
    for plan, param in zip(plans, params, strict=True):
        if plan.rule == "projected" and param.grad is not None:
            projection_rm = draw_projection(0, plan.rank, plan.side, param.device).to(param.dtype)
            pairs.append((projection_rm, param.grad if plan.axis == 0 else param.grad.T))
    return lambda: [projection_rm @ grad for projection_rm, grad in pairs]


def moved_bytes(plan: Plan, element_bytes: int, cache: int) -> int:
    """That APOLLO must move for one tensor; moments and projections are float32."""
    size_bytes = plan.rows * plan.columns * element_bytes
    if plan.rule != "projected":
        return 3 * size_bytes + 4 * plan.rows * plan.columns * 4
    small = 4 * plan.rank * plan.num_channels + plan.rank * plan.side
    return (4 if size_bytes > cache else 3) * size_bytes + small * 4


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max(int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes)


def timed(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begun


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """What a call needs beside what is held before it: the allocator's peak, or the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed(run, device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # Freed memory that is kept would hide what is used again.
    Path("/proc/self/clear_refs").write_text("5")  # The peak is now what is resident.
    peaks = []
    for call in (int, run):
        call()
        peaks.append(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
    return peaks[1] - peaks[0] << 10


def held_bytes(optimizer: Optimizer | None) -> int:
    if isinstance(optimizer, Apollo):
        return optimizer.size_bytes()
    states = optimizer.state.values() if optimizer else ()
    return sum(v.nbytes for s in states for v in s.values() if isinstance(v, Tensor))


def measure(tasks: list[Task], rounds: int, device: torch.device) -> list[Row]:
    """Rows in the order of `tasks`, which take turns; each round begins with another one."""
    first = [timed(task.run, device) for task in tasks]
    times: list[list[float]] = [[] for _ in tasks]
    for number in range(rounds + 1):
        for place in range(len(tasks)):
            at = (place + number) % len(tasks)
            times[at].append(timed(tasks[at].run, device))
    rows = []
    for task, first_s, (_, *seen) in zip(tasks, first, times, strict=True):  # One warms up.
        space = held_bytes(task.optimizer), peak_bytes(task.run, device)
        seconds = first_s, median(seen), min(seen)
        rows.append(Row(task.name, task.moved_bytes, task.flops, *seconds, *space))
    bandwidth = max(row.moved_bytes / row.median_s for row in rows if row.name in STREAMS)
    rate = max(row.flops / row.median_s for row in rows if row.name.startswith("P G"))
    for row in rows:
        row.bandwidth_floor_s, row.matmul_floor_s = row.moved_bytes / bandwidth, row.flops / rate
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: the steps, then the limits and which of them is the higher floor."""
    head = "step|median ms|fastest ms|must move MB|x bandwidth floor|P G GFLOP|x higher floor"
    lines = [f"|{head}|state MB|peak beside it MB|", "|---" * 9 + "|"]
    below = []
    for row in rows:
        over = f"{row.median_s / row.bandwidth_floor_s:.2f}" if row.moved_bytes else "-"
        higher = max(row.bandwidth_floor_s, row.matmul_floor_s)
        lines.append(
            f"| {row.name} | {row.median_s * 1e3:.1f} | {row.min_s * 1e3:.1f} "
            f"| {row.moved_bytes / 1e6:.0f} | {over} | {row.flops / 1e9:.1f} "
            f"| {row.median_s / higher:.2f} | {row.state_bytes / 1e6:.1f} "
            f"| {row.peak_bytes / 1e6:.1f} |"
        )
        ratio = row.matmul_floor_s / (row.bandwidth_floor_s or math.inf)
        limit = "the matmul" if ratio > 1 else "memory bandwidth"
        if row.name in STREAMS:
            below.append(f"{row.name}: {row.moved_bytes / row.median_s / 1e9:.1f} GB/s")
        elif not row.moved_bytes:
            below.append(f"{row.name}: {row.flops / row.median_s / 1e9:.0f} GFLOP/s")
        elif row.flops:
            below.append(f"{row.name}: the limit is {limit} (matmul / bandwidth {ratio:.2f})")
    noise = max(row.median_s / row.min_s for row in rows)
    below.append(f"noise: medians are up to {noise:.2f} times the fastest")
    return "\n".join([*lines, "", *below])


def draw(path: str, results: dict[str, list[Row]], title: str) -> None:
    """One panel a workload: a bar for each step, and marks for the two floors."""
    figure = frame.figure(12, 5)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, every) in zip(panels, results.items(), strict=True):
        rows = [row for row in reversed(every) if row.state_bytes or row.name.startswith("SGD")]
        names, times = [row.name for row in rows], [row.median_s * 1e3 for row in rows]
        axes.bar_label(axes.barh(names, times, color="#56B4E9", label="median step"), fmt=" %.0f")
        floors = [row.bandwidth_floor_s * 1e3 for row in rows]
        axes.scatter(floors, names, 220, "#000000", marker="|", lw=2, label="bandwidth floor")
        floors = [row.matmul_floor_s * 1e3 or math.nan for row in rows]
        axes.scatter(floors, names, 28, "#D55E00", marker="D", label="matmul floor (P G)")
        axes.set(xlabel="milliseconds", title=name, xscale="log")
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.3, zorder=0)
    figure.suptitle(title, fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    frame.draw_to(path, figure)


def too_large(shapes: dict[str, Shape], free_bytes: int, element_bytes: int) -> dict[str, str]:
    """Why shapes are left out: with gradients, two AdamWs and temporaries there are 7 copies."""
    reasons, used = {}, 2 * COPIED_BYTES
    for name, shape in sorted(shapes.items(), key=lambda item: math.prod(item[1])):
        used += 7 * math.prod(shape) * element_bytes
        if used > SHARE_OF_MEMORY * free_bytes:
            reasons[name] = f"needs {used / 1e9:.0f} GB, {free_bytes / 1e9:.0f} GB are free"
    return reasons


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each kind")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["eager"])
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--plot", help="write the picture to this file (needs matplotlib)")
    arguments = frame.begin(parser)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    on_cuda = device.type == "cuda"
    where = torch.cuda.get_device_name() if on_cuda else f"CPU, {arguments.threads} threads"
    title = f"{where}, {arguments.dtype}, torch {torch.__version__}"
    frame.say(f"{title}; load average {os.getloadavg()[0]:.1f}")
    results: dict[str, list[Row]] = {}
    left_out: dict[str, str] = {}
    for name, shapes in WORKLOADS.items():
        free = torch.cuda.mem_get_info()[0] if on_cuda else psutil.virtual_memory().available
        left_out |= too_large(shapes, free, dtype.itemsize)
        kept = {tensor: shape for tensor, shape in shapes.items() if tensor not in left_out}
        tasks = make_tasks(kept, device, dtype, arguments.kernels)
        results[name] = measure(tasks, arguments.rounds, device)
        tasks.clear()
        print(f"\n{name}\n\n{table(results[name])}", flush=True)
    print("\nleft out:", left_out or "nothing", f"\nload average {os.getloadavg()[0]:.1f}")
    rows = {name: [asdict(row) for row in found] for name, found in results.items()}
    frame.keep(
        arguments.json,
        arguments,
        {"setting": title, "left_out": left_out, "workloads": rows},
    )
    if arguments.plot:
        draw(arguments.plot, results, title)


if __name__ == "__main__":
    main()
