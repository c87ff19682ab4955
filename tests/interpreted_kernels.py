"""Triton's programs, interpreted on a CPU, against torch and the oracle; see `test_triton_kernels`.

Blocks are made small here, so that small tensors have many of them and end in the middle of one.
"""

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import Parameter

from apollo.optim import triton_kernels, triton_programs
from apollo.optim.choose import choose_kernels
from apollo.optim.optimizer import Apollo
from apollo.optim.philox import make_key, uniform_16
from apollo.optim.projection import draw_projection
from apollo.optim.release import attach
from apollo.optim.rounding import (
    ROUNDINGS,
    Rounding,
    round_stochastically,
    round_with_correction,
    rounding_seed,
    undo_correction,
)
from apollo.optim.routing import make_plan
from apollo.optim.triton_kernels import TritonKernels
from apollo.optim.update import Kernels, TorchKernels, Update
from tests.test_apollo_oracle import NEAR, Case, cases, compare
from tests.test_changes import check_what_is_noted

CPU = torch.device("cpu")
SEEDS = (0, 1, 2**31, 2**32 + 5, 2**63 - 1)
RULES: dict[str, dict[str, Any]] = {
    "apollo": {"rank": 4},
    "mini": {"rank": 1, "norm_growth": 1.01},
    "scale": {"mode": "scale"},
    "adamw": {"mode": "adamw", "clip": None, "norm_growth": 1.5},
}
PRECISIONS: dict[str, tuple[torch.dtype, Rounding]] = {
    "float32": (torch.float32, "stochastic"),
    **{rounding: (torch.bfloat16, rounding) for rounding in ROUNDINGS},
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(monkeypatch)


def shrink_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton_kernels, "BLOCK_M", {torch.float32: 16})
    patch.setattr(triton_kernels, "MAX_BLOCK_R", {torch.float32: 16})
    patch.setattr(triton_kernels, "MIN_SPLIT_RANKS", 1)
    for name in ("BLOCK_C", "BLOCK_J", "BLOCK_SUM"):
        patch.setattr(triton_kernels, name, 16)


@triton.jit  # type: ignore[untyped-decorator]
def store_uniform(  # type: ignore[no-untyped-def]
    out, seed, row, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr
):
    i, o = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_O)
    numbers = triton_programs.uniform_16(seed, row + i, o)
    tl.store(out + i[:, None] * (BLOCK_O * 8) + tl.arange(0, BLOCK_O * 8), numbers)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_numbers_are_those_of_torch(seed: int) -> None:
    out = torch.empty(8, 32, dtype=torch.int32)
    store_uniform[(1,)](out, seed, 5, BLOCK_I=8, BLOCK_O=4)
    assert torch.equal(out, uniform_16(make_key(seed, CPU), 5, 8, 32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rank", "side"), [(1, 8), (4, 300), (20, 37)])
def test_projection_is_that_of_torch(seed: int, rank: int, side: int) -> None:
    group = Apollo([("w", Parameter(torch.ones(2, 2)))], rank=rank).param_groups[0]
    plan = make_plan("w", (side, 1000), False, group)
    weight = torch.ones(side, 1000)
    task = Update(weight, weight, {}, plan, 1.0, projection_seed=seed, rounding_seed=0)
    normal_rm = TritonKernels()._draw_normal(task)
    assert torch.equal(normal_rm.float() / math.sqrt(rank), draw_projection(seed, rank, side, CPU))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rank", [1, 4, 16, 17])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(20, 41), (41, 20)], ids=str)
def test_projected_updates_agree_with_the_oracle(
    shape: tuple[int, int], precision: str, rank: int
) -> None:
    """Over a refresh of the projection, a gradient of nothing and a huge one."""
    dtype, rounding = PRECISIONS[precision]
    chosen = {"lr": 0.03, "mode": "apollo", "rank": rank, "betas": (0.3, 0.99), "eps": 1e-10}
    chosen |= {"update_proj_gap": 2, "scale": "auto", "clip": 1.3, "norm_growth": 1.01}
    chosen |= {"weight_decay": 0.1, "rounding": rounding}
    sizes = (1.0, 0.0, 1e12)
    compare(Case("q_proj.weight", shape, dtype, chosen, sizes, True, 1 << 20, 3), TritonKernels())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_every_rule_agrees_with_the_oracle(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shrink_blocks(patch)
        compare(case, TritonKernels())


def make(
    kernels: Kernels, shape: tuple[int, ...], precision: str, rule: str, weight: Tensor
) -> tuple[Apollo, Parameter]:
    dtype, rounding = PRECISIONS[precision]
    param = Parameter(weight.to(dtype))
    optimizer = Apollo(
        [("lm_head.weight", param)],
        0.03,
        kernels=kernels,
        rounding=rounding,
        update_proj_gap=2,
        weight_decay=0.1,
        **RULES[rule],
    )
    return optimizer, param


def step(optimizer: Apollo, param: Parameter, grad: Tensor) -> None:
    param.grad = grad.to(param.dtype)
    optimizer.step()


def states(optimizer: Apollo, param: Parameter) -> dict[str, Tensor]:
    return {"param": param.detach().clone()} | {
        key: value.clone() for key, value in optimizer.state[param].items()
    }


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("precision", ["float32", "stochastic", "corrected"])
@pytest.mark.parametrize("shape", [(100, 150), (150, 100)], ids=str)
def test_weights_and_state_agree_with_torch_at_the_real_sizes_of_blocks(
    shape: tuple[int, int], precision: str, rule: str
) -> None:
    found = []
    for kernels in (TritonKernels(), TorchKernels()):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator)
        optimizer, param = make(kernels, shape, precision, rule, weight)
        for _ in range(2):
            step(optimizer, param, torch.randn(shape, generator=generator))
            if "norm_mean" in optimizer.state[param]:  # as after many small gradients
                optimizer.state[param]["norm_mean"].mul_(0.01)
        found.append(states(optimizer, param))
        if "correction" in found[-1]:
            found[-1]["param"] = undo_correction(param.detach(), found[-1].pop("correction"))
    ours, theirs = found
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        # A few elements may be rounded the other way, which is a whole step of bfloat16.
        allowed = 1e-3 if value.dtype == torch.bfloat16 else NEAR
        error = (ours[key].double() - value.double()).norm() / value.double().norm()
        assert error <= allowed, key


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", RULES)
def test_a_value_is_rounded_to_the_bits_of_torch(rule: str, rounding: Rounding) -> None:
    """What the same step leaves in a float32 weight is the value that is rounded to bfloat16."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(30, 50, generator=generator).bfloat16()
    grad = torch.randn(30, 50, generator=generator).bfloat16()
    exact, unrounded = make(TritonKernels(), (30, 50), "float32", rule, weight)
    step(exact, unrounded, grad)
    rounded, param = make(TritonKernels(), (30, 50), rounding, rule, weight)
    step(rounded, param, grad)

    value = unrounded.detach()
    if rounding == "nearest":
        assert torch.equal(param, value.bfloat16())
    elif rounding == "stochastic":
        key = make_key(rounding_seed(0, 1, "lm_head.weight"), CPU)
        assert torch.equal(param, round_stochastically(value, key, 0))
    else:
        nearest, correction = round_with_correction(value)
        assert torch.equal(param, nearest)
        assert torch.equal(rounded.state[param]["correction"], correction)


def test_nearest_takes_ties_to_the_even_number() -> None:
    """A gradient of one element a row, normalised to -1, moves that element by exactly lr."""
    weight = torch.ones(16, 20, dtype=torch.bfloat16)
    weight[:, 0] = (1 + torch.arange(16) * 2.0**-7) * torch.tensor([1, 1, -1, -1]).repeat(4)
    grad = torch.zeros(16, 20)
    grad[:, 0] = -1
    param = Parameter(weight.clone())
    optimizer = Apollo(
        [("q_proj.weight", param)],
        2.0**-8,
        mode="scale",
        scale=1.0,
        clip=None,
        rounding="nearest",
        kernels=TritonKernels(),
    )
    step(optimizer, param, grad)
    assert torch.equal(param, (weight.float() - 2.0**-8 * grad).bfloat16())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("precision", "broken"),
    [("float32", math.nan), ("stochastic", math.inf), ("nearest", 1e17), ("corrected", -math.inf)],
)
@pytest.mark.parametrize("rule", RULES)
def test_gradient_that_is_not_finite_changes_no_bit(
    rule: str, precision: str, broken: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(20, 41, generator=generator)
    optimizer, param = make(TritonKernels(), (20, 41), precision, rule, weight)
    step(optimizer, param, torch.randn(20, 41, generator=generator))
    before = states(optimizer, param)
    grad = torch.randn(20, 41, generator=generator)
    grad[13, 40] = broken
    step(optimizer, param, grad)
    assert optimizer.skipped == ("lm_head.weight",)
    for key, value in states(optimizer, param).items():
        assert torch.equal(value, before[key]), key
    step(optimizer, param, torch.randn(20, 41, generator=generator))
    assert not optimizer.skipped
    assert int(optimizer.state[param]["step"]) == 2
    assert not torch.equal(param, before["param"])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rule", RULES)
def test_tensors_may_have_any_strides_and_a_step_repeats(rule: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(20, 41, generator=generator)
    grads = [torch.randn(20, 41, generator=generator) for _ in range(2)]

    def run(turn: Any) -> Tensor:
        dtype, _ = PRECISIONS["stochastic"]
        param = Parameter(turn(weight.to(dtype)))
        optimizer = Apollo([("lm_head.weight", param)], 0.03, kernels=kernels, **RULES[rule])
        for grad in grads:
            param.grad = turn(grad.to(dtype))
            optimizer.step()
        return param.detach().clone(memory_format=torch.contiguous_format)

    kernels = TritonKernels()
    straight = run(torch.clone)
    assert torch.equal(run(torch.clone), straight)
    assert torch.equal(run(lambda x: x.T.contiguous().T), straight)
    assert torch.equal(run(lambda x: torch.stack((x, x), -1)[..., 0]), straight)
    assert kernels.size_bytes() in (0, 1 << 17)


def test_autograd_refuses_a_graph_whose_weight_was_written() -> None:
    weight = torch.randn(20, 41, generator=torch.Generator().manual_seed(4))
    optimizer, param = make(TritonKernels(), (20, 41), "float32", "apollo", weight)
    inputs = torch.ones(3, 20, requires_grad=True)
    loss = (inputs @ param).square().sum()
    step(optimizer, param, torch.ones(20, 41))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_module_is_taught_through_released_gradients_as_with_torch() -> None:
    def teach(kernels: Kernels) -> list[Tensor]:
        torch.manual_seed(5)
        module = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
        optimizer = Apollo(module.named_parameters(), 0.01, rank=4, kernels=kernels)
        inputs = torch.randn(6, 24)
        with attach(module, optimizer) as release:
            for _ in range(3):
                release.begin_step()
                (module(inputs) - inputs).square().mean().backward()
                release.end_step()
        return [param.detach() for param in module.parameters()]

    for ours, theirs in zip(teach(TritonKernels()), teach(TorchKernels()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_step_has_changed_is_noted(rule: str, precision: str) -> None:
    check_what_is_noted(TritonKernels(), rule, precision)


def test_interpreter_lets_triton_be_chosen_on_a_cpu() -> None:
    assert isinstance(choose_kernels("triton", CPU), TritonKernels)
    assert isinstance(choose_kernels("auto", CPU), TorchKernels)
