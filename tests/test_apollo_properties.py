"""What the papers and our own measurements say of the optimizer, measured again.

The bounds stand beside the numbers that were measured when they were chosen.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoModelForCausalLM, AutoTokenizer

from apollo.optim.optimizer import Apollo

ROOT = Path(__file__).parents[1]


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update_of(param: Parameter, optimizer: Apollo, grad: Tensor) -> Tensor:
    """What one step subtracts, at a learning rate of 1."""
    before = param.detach().clone()
    param.grad = grad
    optimizer.step()
    return before - param.detach()


@pytest.mark.parametrize("signal", [0.0, 0.3], ids=["noise", "noise and a direction that stays"])
@pytest.mark.parametrize(("shape", "rank"), [((256, 512), 64), ((512, 256), 64), ((256, 512), 16)])
def test_channels_are_scaled_by_sqrt_of_rank_over_smaller_side_of_adams_scale(
    shape: tuple[int, int], rank: int, signal: float
) -> None:
    """Mean over channels: 0.5041, 0.5037 and 0.2538 where 0.5, 0.5 and 0.25 are predicted."""
    projected, full = Parameter(torch.zeros(shape)), Parameter(torch.zeros(shape))
    apollo = Apollo([("w", projected)], 1.0, rank=rank, scale=1.0, clip=None)
    adam = Apollo([("w", full)], 1.0, mode="adamw", clip=None)
    for step in range(40):
        grad = noise(shape, step) + signal * noise(shape, 99)
        ours, theirs = update_of(projected, apollo, grad), update_of(full, adam, grad)
    smaller = 0 if shape[0] < shape[1] else 1
    ratio = (ours.norm(dim=smaller) / theirs.norm(dim=smaller)).mean().item()
    assert ratio == pytest.approx(math.sqrt(rank / min(shape)), rel=0.05)


def test_updates_of_a_real_model_are_as_large_as_adamws(model_dir: Path) -> None:
    """0.45 against 0.43 on the 21 matrices of three late layers of SmolLM2, after 6 texts."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    places = ("layers.20.", "layers.25.", "layers.29.")
    matrices: dict[str, Parameter] = {}
    for name, param in model.named_parameters():
        param.requires_grad_(param.dim() == 2 and any(place in name for place in places))
        if param.requires_grad:
            matrices[name] = param
    assert len(matrices) == 21

    # At a learning rate of 0 both see the same gradients, and say what they would have done.
    options: dict[str, Any] = {"lr": 0.0, "clip": None}
    apollo = Apollo(matrices.items(), rank=64, **options)
    adamw = Apollo(matrices.items(), mode="adamw", **options)
    ids = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]
    for first in range(0, 6 * 32, 32):
        text = torch.tensor([ids[first : first + 32]])
        model(input_ids=text, labels=text).loss.backward()
        apollo.step()
        adamw.step()
        apollo.zero_grad()
    assert {len(state["exp_avg"]) for state in apollo.state.values()} == {64}
    assert mean_rms(apollo) == pytest.approx(mean_rms(adamw), rel=0.1)
    assert 0.2 < mean_rms(adamw) < 0.6  # not the 1 of a first step
    print(f"update RMS: APOLLO {mean_rms(apollo):.3f}, AdamW {mean_rms(adamw):.3f}")


def mean_rms(optimizer: Apollo) -> float:
    return average(report.update_rms for report in optimizer.reports.values())


def average(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return sum(found) / len(found)


@pytest.mark.parametrize("keeps_moments", [True, False], ids=["kept", "reset, for comparison"])
def test_new_projection_dips_the_update_where_reset_moments_would_spike_it(
    keeps_moments: bool,
) -> None:
    """Over the mean of the 20 steps before: kept, it dips to 0.865 seven steps later and is never
    above 1.074; reset, it spikes to 2.33."""
    shape, gap = (128, 256), 100
    param = Parameter(torch.zeros(shape))
    optimizer = Apollo([("w", param)], 1.0, rank=64, clip=None, update_proj_gap=gap)
    sizes = []
    for step in range(gap + 60):
        if step == gap and not keeps_moments:
            optimizer.state[param].clear()
        grad = noise(shape, step) + 0.5 * noise(shape, 999)
        sizes.append(update_of(param, optimizer, grad).norm().item())
    before, after = average(sizes[gap - 20 : gap]), sizes[gap:]
    if keeps_moments:
        assert 0.8 * before < min(after) < 0.9 * before
        assert max(after) < 1.15 * before
    else:
        assert max(after) > 2 * before


def steps_until_recovered(**limits: float | None) -> int:
    """Steps after 20 near-zero gradients until an update is 95 % of its size before them."""
    shape = (64, 128)
    param = Parameter(torch.zeros(shape))
    optimizer = Apollo([("w", param)], 1.0, rank=16, **limits)  # type: ignore[arg-type]
    for step in range(50):
        before = update_of(param, optimizer, noise(shape, step)).norm()
    for step in range(50, 70):
        update_of(param, optimizer, 1e-8 * noise(shape, step))
    for step in range(70, 470):
        if update_of(param, optimizer, noise(shape, step)).norm() > 0.95 * before:
            return step - 70
    raise AssertionError("never")


def test_norm_growth_limiter_throttles_for_some_200_steps_where_the_clip_does_not() -> None:
    """The limiter lets the norm rise from 0.037 to 0.24 by 1 % a step: 185 of them."""
    assert 150 < steps_until_recovered(norm_growth=1.01, clip=None) < 230
    assert steps_until_recovered() <= 5
    assert steps_until_recovered(clip=None) <= 5


def test_norm_growth_limiter_lets_an_update_grow_by_its_factor_and_no_more() -> None:
    shape = (64, 128)
    param = Parameter(torch.zeros(shape))
    optimizer = Apollo([("w", param)], 1.0, rank=16, clip=None, norm_growth=1.01)
    grads = [noise(shape, step) * (1e-3 if step < 10 else 1.0) for step in range(60)]
    sizes = [update_of(param, optimizer, grad).norm().item() for grad in grads]
    growth = [after / before for before, after in pairwise(sizes)]
    assert max(growth) == pytest.approx(1.01, rel=1e-4)
    assert sum(ratio == pytest.approx(1.01, rel=1e-4) for ratio in growth) > 10


@pytest.mark.parametrize(("shape", "rank"), [((64, 256), 1), ((256, 64), 1), ((64, 256), 8)])
def test_mini_scales_the_whole_gradient_and_channel_wise_every_channel(
    shape: tuple[int, int], rank: int
) -> None:
    param = Parameter(torch.zeros(shape))
    optimizer = Apollo([("w", param)], 1.0, rank=rank)
    for step in range(5):
        grad = noise(shape, step)
        factors = update_of(param, optimizer, grad) / grad
    along = factors.std(dim=0 if shape[0] < shape[1] else 1) / factors.mean()
    across = factors.std() / factors.mean()
    assert along.max() < 1e-2  # rounding of the weights that the update was read from
    assert (across < 1e-2) == (rank == 1)


def test_update_ignores_the_size_of_the_gradient() -> None:
    """Scaled by a power of two, as a loss in other units would be: the same bits."""
    for mode in ("apollo", "scale", "adamw"):
        weights = []
        for size in (1.0, 2.0**20, 2.0**-20):
            param = Parameter(torch.zeros(24, 48))
            # eps is what stands against it; this one is too small to be seen.
            optimizer = Apollo([("w", param)], 1.0, rank=8, mode=mode, eps=1e-30)
            for step in range(4):
                update_of(param, optimizer, size * noise((24, 48), step))
            weights.append(param.detach())
        torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights[2], weights[0], rtol=1e-5, atol=1e-5)


def test_scale_gives_each_output_neuron_the_same_norm() -> None:
    """Rows of a hidden matrix and of the head, columns of an embedding: sqrt of their length."""
    for name, axis in [("q_proj.weight", 1), ("lm_head.weight", 1), ("embed_tokens.weight", 0)]:
        param = Parameter(torch.zeros(24, 48))
        optimizer = Apollo([(name, param)], 1.0, mode="scale", clip=None)
        for step in range(3):
            update = update_of(param, optimizer, noise((24, 48), step))
        expected = torch.full((48, 24)[axis : axis + 1], math.sqrt((24, 48)[axis]))
        torch.testing.assert_close(update.norm(dim=axis), expected, rtol=1e-5, atol=0.0)
