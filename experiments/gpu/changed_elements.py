"""What a commit moves off the device: all weights, or what changed of them and a bit for each.

    .venv/bin/python -m experiments.gpu.changed_elements --device cuda --layers 4 --json FILE
    .venv/bin/python -m experiments.gpu.changed_elements --divide 16    # a CPU, as far as it goes

Weights of the shapes of Qwen3.5-27B, random in bfloat16, as many of each as are asked for
beside one `lm_head`; APOLLO with stochastic rounding and random gradients. Before the commits,
steps take turns: with the map of changes and without it. Then after 1, 4 and 16 steps:

    all        every weight to pinned host memory, as the checkpoint actor does it
    changed    `changes.take` on the device, which is what the trainer waits for, then its way to
               the host while the trainer could go on
    check      the host's copy from before, brought up to date with `changes.put`, has every bit
               of the live weights: the comparison of all of it stays the oracle

An element of a step changes with the probability of its size over the last place, so the rate and
the scale of the weights are what the shares depend on; both are said.
"""

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Parameter

from apollo.optim.changes import Taken, make_map, put, take, words
from apollo.optim.choose import choose_kernels
from apollo.optim.optimizer import Apollo
from apollo.optim.routing import matrix_shape
from experiments import frame
from experiments.optimizer_bench import WORKLOADS, timed

HEAD: Final = "lm_head, embed_tokens"
STD: Final = 0.02
STEPS: Final = (1, 4, 16)
REPEATS: Final = 5


def make_weights(layers: int, divide: int, device: torch.device) -> dict[str, Parameter]:
    """Random, in bfloat16; each side a `divide`th of the real one."""
    known = WORKLOADS["Qwen3.5-27B, one of each shape"]
    shapes = {f"{at}.{name}": known[name] for at in range(layers) for name in known if name != HEAD}
    shapes["lm_head"] = known[HEAD]
    torch.manual_seed(0)
    return {
        name: Parameter(
            torch.randn(*(side // divide for side in shape), device=device).mul_(STD).bfloat16()
        )
        for name, shape in shapes.items()
    }


def step(optimizer: Apollo, weights: dict[str, Parameter], seed: int) -> None:
    """One step, with gradients that are made and released one by one."""
    generator = torch.Generator(next(iter(weights.values())).device).manual_seed(seed)
    optimizer.begin_step()
    for param in weights.values():
        grad = torch.empty_like(param).normal_(generator=generator)
        optimizer.step_parameter(param, grad)
    optimizer.end_step()


def cost_of_noting(
    optimizers: dict[str, Apollo], weights: dict[str, Parameter], device: torch.device
) -> dict[str, float]:
    """Median seconds of a step, with and without maps, by turns; gradients are in both."""
    seen: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(REPEATS + 1):
        for name, optimizer in optimizers.items():
            seconds = timed(partial(step, optimizer, weights, number), device)
            if number:  # The first one compiles.
                seen[name].append(seconds)
    return {name: median(times) for name, times in seen.items()}


def commit(
    optimizer: Apollo, weights: dict[str, Parameter], host: dict[str, Tensor], device: torch.device
) -> dict[str, Any]:
    """Take what changed and bring `host` up to date with it, and copy all beside it."""
    live = {
        name: param.detach().view(matrix_shape(tuple(param.shape)))
        for name, param in weights.items()
    }
    pinned = {n: torch.empty_like(host[n], pin_memory=v.is_cuda) for n, v in live.items()}
    all_s = timed(lambda: [pinned[name].copy_(value) for name, value in live.items()], device)
    taken: dict[str, Taken] = {}

    def take_all() -> None:
        for name, value in live.items():
            taken[name] = take(value, optimizer.changed[name])

    stall_s = timed(take_all, device)
    arrived: dict[str, Taken] = {}

    def fetch_all() -> None:
        for name, each in taken.items():
            arrived[name] = Taken(each.values.cpu(), each.changed_io.cpu())

    fetch_s = timed(fetch_all, device)
    for name, each in arrived.items():
        put(host[name], each)
        if not torch.equal(words(host[name]), words(pinned[name])):
            raise SystemExit(f"{name}: what was taken is not what changed")
    moved = sum(each.values.nbytes + each.changed_io.nbytes for each in arrived.values())
    total = sum(value.nbytes for value in live.values())
    num_changed = sum(len(each.values) for each in arrived.values())
    return {
        "changed_share": num_changed / sum(value.numel() for value in live.values()),
        "moved_share": moved / total,
        "moved_gb": moved / 1e9,
        "all_gb": total / 1e9,
        "all_s": all_s,
        "stall_s": stall_s,
        "fetch_s": fetch_s,
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        "steps|changed|moved, of all|moved GB|all GB|stall, all ms|stall, changed ms|to the host ms"
    )
    lines = [f"|{head}|", "|---" * 8 + "|"]
    for row in rows:
        lines.append(
            f"| {row['steps']} | {row['changed_share']:.2%} | {row['moved_share']:.1%} "
            f"| {row['moved_gb']:.3g} | {row['all_gb']:.3g} | {row['all_s'] * 1e3:.1f} "
            f"| {row['stall_s'] * 1e3:.1f} | {row['fetch_s'] * 1e3:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=1, help="of each matrix, beside one lm_head")
    parser.add_argument("--divide", type=int, default=1, help="make each side so much shorter")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--json", type=Path, help="write the summary here")
    options = frame.begin(parser)
    device = torch.device(options.device)
    weights = make_weights(options.layers, options.divide, device)
    size = sum(param.nbytes for param in weights.values())
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    frame.say(f"{where}: {size / 1e9:.3g} GB of weights, lr {options.lr:g}, weights of {STD} (std)")
    maps = {
        name: make_map(*matrix_shape(tuple(param.shape)), device) for name, param in weights.items()
    }
    optimizers = {
        name: Apollo(
            weights.items(),
            options.lr,
            rank=options.rank,
            kernels=choose_kernels("auto", device),
            changed=maps if name == "noting" else None,
        )
        for name in ("plain", "noting")
    }
    cost = cost_of_noting(optimizers, weights, device)
    ratio = cost["noting"] / cost["plain"]
    frame.say(f"a step: {cost['plain'] * 1e3:.1f} ms, with the map {ratio:.3f} times that")
    optimizer = optimizers["noting"]
    host = {
        name: param.detach().cpu().clone().view(matrix_shape(tuple(param.shape)))
        for name, param in weights.items()
    }
    for changed_io in maps.values():
        changed_io.zero_()
    rows = []
    for number in STEPS:
        for at in range(number):
            step(optimizer, weights, 100 * number + at)
        rows.append({"steps": number, **commit(optimizer, weights, host, device)})
        frame.say(f"{number} steps: {rows[-1]['changed_share']:.2%} changed, every bit agrees")
    print("\n" + table(rows), flush=True)
    frame.keep(options.json, options, {"device": where, "step_s": cost, "commits": rows})


if __name__ == "__main__":
    main()
