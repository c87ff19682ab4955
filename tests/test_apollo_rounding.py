"""From float32 to bfloat16: what each rounding keeps of a small step, and what it may not do."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from apollo.optim.optimizer import Apollo
from apollo.optim.philox import make_key
from apollo.optim.rounding import (
    ROUNDINGS,
    Rounding,
    round_stochastically,
    round_with_correction,
    rounding_seed,
    undo_correction,
)

CPU = torch.device("cpu")
SHAPE = (128, 384)
WEIGHT_STD = 0.1  # SmolLM2's
NUM_STEPS = 32


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


START = (noise(0) * WEIGHT_STD).bfloat16()


class Run:
    """Thirty-two steps at a learning rate of 1e-5, with a direction that stays and noise."""

    def __init__(self, rounding: Rounding | Literal["float32"], seed: int = 0) -> None:
        is_float32 = rounding == "float32"
        param = Parameter(START.float() if is_float32 else START.clone())
        optimizer = Apollo([("w", param)], 1e-5, rank=16, seed=seed)
        # Noise is drawn from the seed; the same projections are kept for all.
        optimizer.param_groups[0]["rounding"] = "nearest" if is_float32 else rounding
        self.changed = []
        for step in range(NUM_STEPS):
            grad = (0.5 * noise(99) + noise(step + 1)).bfloat16()
            param.grad = grad.to(param.dtype)
            optimizer.step()
            self.changed.append(optimizer.reports["w"].changed)
        self.weight = param.detach()
        self.moved = self.weight.double() - START.double()


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {"float32": Run("float32"), **{rounding: Run(rounding) for rounding in ROUNDINGS}}


def share_kept(run: Run, exact: Run) -> float:
    """How much of the exact movement, and in its direction, was made."""
    return float((run.moved * exact.moved).sum() / exact.moved.square().sum())


def test_nearest_loses_nine_tenths_of_the_steps_and_stochastic_none(runs: dict[str, Run]) -> None:
    """Kept after 32 steps: nearest 3.6 %, stochastic 100.1 %, corrected 42 %."""
    exact = runs["float32"]
    assert share_kept(runs["nearest"], exact) < 0.1
    assert share_kept(runs["stochastic"], exact) == pytest.approx(1.0, abs=0.1)
    assert share_kept(runs["nearest"], exact) < share_kept(runs["corrected"], exact)


def test_stochastic_rounding_does_not_drift(runs: dict[str, Run]) -> None:
    error = runs["stochastic"].moved - runs["float32"].moved
    along = error * runs["float32"].moved.sign()  # a loss would lie against the movement
    for values in (error, along):
        standard_error = values.std() / math.sqrt(values.numel())
        assert abs(values.mean()) < 4 * standard_error
    nearest = (runs["nearest"].moved - runs["float32"].moved) * runs["float32"].moved.sign()
    assert abs(nearest.mean()) > 20 * nearest.std() / math.sqrt(nearest.numel())


def test_corrected_follows_float32_and_shows_its_nearest_bfloat16(runs: dict[str, Run]) -> None:
    """They differ where 24 bits and 32 lie on two sides of a middle: 0.2 % of the elements."""
    differs = runs["corrected"].weight != runs["float32"].weight.bfloat16()
    assert differs.float().mean() < 5e-3
    assert (runs["corrected"].weight != START).float().mean() > 0.1


def test_corrected_changes_fewer_elements_than_stochastic(runs: dict[str, Run]) -> None:
    """A step: 2.6 % against 3.5 %; after 32 of them 18 % against 36 %."""
    per_step = {name: sum(run.changed) / NUM_STEPS for name, run in runs.items()}
    assert per_step["corrected"] < 0.85 * per_step["stochastic"]
    in_all = {name: float((run.weight != START).float().mean()) for name, run in runs.items()}
    assert in_all["corrected"] < 0.6 * in_all["stochastic"]


def test_only_stochastic_rounding_draws_numbers() -> None:
    def weight_after_a_step(rounding: Rounding, seed: int) -> Tensor:
        param = Parameter(START.clone())
        # Adam, so that the seed is that of the noise alone.
        optimizer = Apollo([("w", param)], 1e-4, mode="adamw", rounding=rounding, seed=seed)
        param.grad = noise(1).bfloat16()
        optimizer.step()
        return param.detach()

    for rounding in ROUNDINGS:
        first, again = weight_after_a_step(rounding, 1), weight_after_a_step(rounding, 1)
        other = weight_after_a_step(rounding, 2)
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (rounding != "stochastic")


floats = st.lists(
    st.floats(-(2.0**100), 2.0**100, width=32).map(lambda value: value or 1.0),
    min_size=1,
    max_size=40,
)


def bits_of(value: Tensor) -> list[int]:
    """Of float32 numbers, as sign and magnitude, which orders them."""
    return value.view(torch.int32).flatten().tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=floats)
def test_weight_and_correction_are_the_upper_24_bits_and_the_nearest_bfloat16(
    values: list[float],
) -> None:
    exact = torch.tensor(values)
    weight, correction = round_with_correction(exact)
    assert (weight.dtype, correction.dtype) == (torch.bfloat16, torch.int8)
    back = undo_correction(weight, correction)
    for bits, returned in zip(bits_of(exact), bits_of(back), strict=True):
        assert returned % 256 == 0
        assert abs(bits - returned) <= 128
    # Twice is once: nothing is lost by storing what was stored.
    again, correction_again = round_with_correction(back)
    assert torch.equal(again, weight)
    assert torch.equal(correction_again, correction)
    # Of two bfloat16 numbers around the 24 bits, the nearer one.
    for bits, rounded in zip(bits_of(back), bits_of(weight.float()), strict=True):
        assert abs(bits - rounded) <= 1 << 15


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=floats, seed=st.integers(0, 2**63 - 1))
def test_stochastic_rounding_takes_one_of_the_two_neighbours(
    values: list[float], seed: int
) -> None:
    exact = torch.tensor([values])
    weight = round_stochastically(exact, make_key(seed, CPU), 0).float()
    for bits, rounded in zip(bits_of(exact), bits_of(weight), strict=True):
        assert rounded % (1 << 16) == 0
        assert -(1 << 16) < rounded - bits < 1 << 16


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_step_of_nothing_changes_no_bit_of_any_bfloat16_number(rounding: Rounding) -> None:
    """All 65280 finite ones, subnormal numbers and both zeros among them."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    numbers = every.view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()].view(255, 256).clone()
    param = Parameter(numbers.clone())
    optimizer = Apollo([("w", param)], 0.0, rank=4, weight_decay=0.1, rounding=rounding)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert torch.equal(param.detach().view(torch.int16), numbers.view(torch.int16))
        assert optimizer.reports["w"].changed == 0


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("low", [1.0, -1.0, 3e-5])
def test_chance_of_the_farther_neighbour_is_the_share_of_the_way(low: float, share: float) -> None:
    """Over 200 x 500 places, within four standard errors."""
    below = torch.tensor(low).bfloat16().float()
    above = (below.view(torch.int32) + (1 << 16)).view(torch.float32)
    exact = torch.lerp(below, above, share).expand(200, 500).contiguous()
    drawn = round_stochastically(exact, make_key(rounding_seed(0, 1, "w"), CPU), 0).float()
    taken = (drawn == above).double().mean().item()
    assert (drawn == below).double().mean().item() == pytest.approx(1 - taken)
    standard_error = math.sqrt(share * (1 - share) / exact.numel())
    assert abs(taken - share) < 4 * standard_error


def test_noise_is_not_shared_by_places_steps_or_tensors() -> None:
    exact = torch.full((64, 64), 1 + 2.0**-8)  # in the middle of two bfloat16 numbers

    def drawn(step: int, name: str) -> Tensor:
        key = make_key(rounding_seed(0, step, name), CPU)
        return (round_stochastically(exact, key, 0) > 1).double() - 0.5

    first = drawn(1, "a")
    limit = 4 * 0.25 / 64  # four standard errors of a mean of 4096 products of +-1/2
    for other in (drawn(2, "a"), drawn(1, "b"), first.roll(1, 0), first.roll(1, 1)):
        assert abs((first * other).mean()) < limit
