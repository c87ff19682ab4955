"""Apollo against its oracle, and what an optimizer under a running server must never do."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from apollo.optim.optimizer import Apollo
from apollo.optim.philox import derive_seed, make_key
from apollo.optim.projection import draw_projection, projection_seed
from apollo.optim.release import attach
from apollo.optim.rounding import round_stochastically, rounding_seed
from tests.reference import ReferenceApollo

CPU = torch.device("cpu")


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def take_step(optimizer: Apollo, param: Parameter, grad: Tensor) -> tuple[str, ...]:
    param.grad = grad.clone()
    optimizer.step()
    return optimizer.skipped


def bits_of(optimizer: Apollo, param: Parameter) -> list[bytes]:
    tensors = [param.detach().float(), *optimizer.state[param].values()]
    return [tensor.numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("clip", [None, 1.2])
@pytest.mark.parametrize(
    "shape", [(16, 40), (40, 16), (24, 24), (4, 40), (33,), (5, 3, 4)], ids=lambda shape: str(shape)
)
def test_steps_agree_with_the_oracle_across_projection_refreshes(
    shape: tuple[int, ...], clip: float | None
) -> None:
    rank, gap, seed, lr = 4, 3, 7, 1e-2
    param = Parameter(random_tensor(*shape))
    start = param.detach().clone()
    optimizer = Apollo(
        [("w", param)], lr, rank=rank, update_proj_gap=gap, weight_decay=0.1, clip=clip, seed=seed
    )
    assert start.dtype == torch.float32
    oracle = ReferenceApollo(start.double().numpy(), lr, weight_decay=0.1, clip=clip)
    is_projected = len(shape) == 2 and min(shape) > rank
    for step in range(10):
        grad = random_tensor(*shape, seed=step + 1) * (10.0 if step == 5 else 1.0)
        grad[..., 0] = 0  # a channel, or an element, that has no gradient
        projection = draw_projection(projection_seed(seed, "w", step // gap), rank, min(shape), CPU)
        oracle.step(grad.double().numpy(), projection.double().numpy() if is_projected else None)
        assert take_step(optimizer, param, grad) == ()
    moved = np.abs(oracle.weight - start.double().numpy()).max()
    error = np.abs(oracle.weight - param.detach().double().numpy()).max()
    assert moved > 1e-2
    assert error < 1e-5 * max(1.0, moved)


def test_auto_scale_corrects_the_ratio_of_rank_and_smaller_side() -> None:
    rank, shape = 16, (64, 256)
    updates = {}
    for scale in ("auto", 1.0):
        param = Parameter(torch.zeros(shape))
        optimizer = Apollo([("w", param)], 1.0, rank=rank, scale=scale, clip=None)
        for step in range(30):
            before = param.detach().clone()
            take_step(optimizer, param, random_tensor(*shape, seed=step))
        updates[scale] = (param.detach() - before).norm().item()
    plain = ReferenceApollo(np.zeros(shape), 1.0)
    for step in range(30):
        last = plain.weight
        plain.step(random_tensor(*shape, seed=step).double().numpy(), None)
    adam = float(np.linalg.norm(plain.weight - last))
    assert updates[1.0] / updates["auto"] == pytest.approx(math.sqrt(rank / 64), rel=1e-5)
    assert updates["auto"] / adam == pytest.approx(1.0, rel=0.1)


def test_projection_is_a_function_of_seed_name_and_refresh_and_keeps_norms() -> None:
    def draw(seed: int, name: str, refresh: int) -> Tensor:
        return draw_projection(projection_seed(seed, name, refresh), 64, 512, CPU)

    first = draw(1, "a", 0)
    assert torch.equal(first, draw(1, "a", 0))
    for other in ((2, "a", 0), (1, "b", 0), (1, "a", 1)):
        assert not torch.equal(first, draw(*other))
    vectors = random_tensor(512, 400)
    ratio = (first @ vectors).norm(dim=0).square() / vectors.norm(dim=0).square()
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.1)
    assert derive_seed("a", 1) == 6222101017213550541  # the same on every machine


def test_stochastic_rounding_is_unbiased_where_nearest_loses_the_step() -> None:
    def noise_key(step: int) -> Tensor:
        return make_key(rounding_seed(0, step, "w"), CPU)

    ones = torch.ones(400, 500, dtype=torch.bfloat16)
    exact = ones.float() - 1e-4  # bfloat16 steps by 0.0039 below 1
    assert torch.equal(exact.bfloat16(), ones)
    weight = round_stochastically(exact, noise_key(1), 0)
    assert set(weight.flatten().tolist()) == {1.0, 1.0 - 2**-8}
    assert weight.double().mean().item() == pytest.approx(1.0 - 1e-4, abs=1e-5)
    assert torch.equal(weight, round_stochastically(exact, noise_key(1), 0))
    assert not torch.equal(weight, round_stochastically(exact, noise_key(2), 0))
    assert torch.equal(weight, round_stochastically(weight.float(), noise_key(3), 0))
    lower = round_stochastically(exact[100:], noise_key(1), 100)
    assert torch.equal(weight[100:], lower)


def test_bfloat16_weights_follow_float32_ones_on_average() -> None:
    shape, lr = (64, 512), 1e-5
    exact, coarse = Parameter(torch.ones(shape)), Parameter(torch.ones(shape).bfloat16())
    for param in (exact, coarse):
        optimizer = Apollo([("w", param)], lr, rank=8)
        for _ in range(20):
            take_step(optimizer, param, torch.ones(shape).to(param.dtype))
        assert {
            tensor.dtype for key, tensor in optimizer.state[param].items() if key != "step"
        } == {torch.float32}
    moved = 1 - exact.detach().double().mean().item()
    assert moved > 1e-4
    assert 1 - coarse.detach().double().mean().item() == pytest.approx(moved, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (33,)])
@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e38])
def test_gradient_that_is_not_finite_changes_no_bit_of_the_tensor_and_its_state(
    dtype: torch.dtype, shape: tuple[int, ...], bad: float
) -> None:
    param = Parameter(random_tensor(*shape).to(dtype))
    with torch.no_grad():
        param.view(-1)[:4] = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    other = Parameter(torch.zeros(8, 8))
    optimizer = Apollo([("w", param), ("other", other)], 1e-2, rank=4, weight_decay=0.1)
    grad = torch.full(shape, 0.1, dtype=dtype)
    grad.view(-1)[5] = bad
    for _ in range(2):  # with and without moments
        before = bits_of(optimizer, param) if optimizer.state[param] else None
        other_before = other.detach().clone()
        other.grad = torch.ones_like(other)
        weight_before = param.detach().clone()
        assert take_step(optimizer, param, grad) == ("w",)
        assert [report.is_finite for report in optimizer.reports.values()] == [False, True]
        assert torch.equal(param, weight_before)
        assert before is None or bits_of(optimizer, param) == before
        assert all(not value.any() for value in optimizer.state[param].values()) or before
        assert not torch.equal(other, other_before)
        assert take_step(optimizer, param, torch.ones(shape, dtype=dtype)) == ()


def test_zero_and_vanishing_gradients_stay_finite_and_do_not_throttle_later_steps() -> None:
    param = Parameter(torch.zeros(16, 40))
    optimizer = Apollo([("w", param)], 1.0, rank=4)
    for scale in (0.0, 1.0, 1e-30, 1e-15, 0.0):
        for step in range(20):
            take_step(optimizer, param, random_tensor(16, 40, seed=step) * scale)
            assert param.isfinite().all()
    norms = []
    for step in range(40):
        before = param.detach().clone()
        take_step(optimizer, param, random_tensor(16, 40, seed=step))
        norms.append((param.detach() - before).norm().item())
    assert norms[9] > 0.5 * norms[-1]


def test_one_huge_gradient_is_clipped_against_the_running_mean() -> None:
    norms = {}
    for clip in (None, 2.0):
        param = Parameter(torch.zeros(16, 40))
        optimizer = Apollo([("w", param)], 1.0, rank=4, clip=clip)
        for step in range(60):
            before = param.detach().clone()
            take_step(
                optimizer, param, random_tensor(16, 40, seed=step) * (1e6 if step == 59 else 1)
            )
        norms[clip] = (param.detach() - before).norm().item()
    mean = optimizer.state[param]["norm_mean"].item()
    assert norms[2.0] < 0.9 * norms[None]
    assert norms[2.0] < 2 * mean


class Tied(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (
            Linear(24, 24),
            Linear(24, 24),
            Linear(24, 24, bias=False),
        )
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return hidden.square().mean()


def test_stepping_in_hooks_equals_ordinary_stepping_with_tied_weights() -> None:
    hooked, ordinary = Tied(), Tied()
    hooked_optimizer = Apollo(hooked.named_parameters(), 1e-2, rank=4, update_proj_gap=3)
    optimizer = Apollo(ordinary.named_parameters(), 1e-2, rank=4, update_proj_gap=3)
    start = hooked.first.weight.detach().clone()
    release = attach(hooked, hooked_optimizer)
    for step in range(7):
        batch = random_tensor(8, 24, seed=step)
        release.begin_step()
        hooked(batch).backward()
        release.end_step()
        assert hooked_optimizer.skipped == ()
        assert len(hooked_optimizer.reports) == 4
        assert all(param.grad is None for param in hooked.parameters())
        optimizer.zero_grad()
        ordinary(batch).backward()
        optimizer.step()
    assert not torch.equal(hooked.first.weight, start)
    for ours, theirs in zip(hooked.parameters(), ordinary.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    release.close()
    hooked(batch).backward()
    assert hooked.first.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_goes_through_the_existing_storage_of_a_strided_view(dtype: torch.dtype) -> None:
    fused = random_tensor(40, 60).to(dtype)
    param = Parameter(fused[8:28, 10:50])
    before, address = fused.clone(), param.data_ptr()
    take_step(Apollo([("w", param)], 0.1, rank=4), param, torch.ones(20, 40, dtype=dtype))
    assert param.data_ptr() == address == fused[8:28, 10:50].data_ptr()
    changed = fused != before
    assert changed[8:28, 10:50].all()
    assert changed.sum() == 20 * 40


def run(dtype: torch.dtype, steps: range, resume: tuple[Tensor, dict[str, Any]] | None) -> Any:
    param = Parameter(random_tensor(16, 40).to(dtype) if resume is None else resume[0].clone())
    optimizer = Apollo([("w", param)], 1e-2, rank=4, update_proj_gap=4, seed=3)
    if resume is not None:
        optimizer.load_state_dict(resume[1])
    for step in steps:
        take_step(optimizer, param, random_tensor(16, 40, seed=step).to(dtype))
    return param.detach().clone(), copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_repeats_bit_for_bit_also_when_it_is_resumed(dtype: torch.dtype) -> None:
    whole, _ = run(dtype, range(10), None)
    assert torch.equal(whole, run(dtype, range(10), None)[0])
    assert torch.equal(whole, run(dtype, range(6, 10), run(dtype, range(6), None))[0])


def test_state_holds_rank_times_channels_and_says_its_size() -> None:
    param = Parameter(torch.zeros(16, 40))
    optimizer = Apollo([("w", param)], rank=4)
    assert optimizer.size_bytes() == 0
    take_step(optimizer, param, torch.ones(16, 40))
    moments, projection, scalars = 2 * 4 * 40 * 4, 4 * 16 * 4, 8 + 4
    assert optimizer.size_bytes() == moments + projection + scalars


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rank", 0), ("eps", 0.0), ("betas", (0.9, 1.0)), ("clip", 0.5), ("update_proj_gap", 0)],
)
def test_bad_settings_are_refused_by_name_and_value(setting: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"{setting}={value}".replace("(", r"\(").replace(")", r"\)")
    ):
        Apollo([("w", Parameter(torch.zeros(4)))], **{setting: value})


def test_what_the_optimizer_cannot_hold_is_refused_by_name() -> None:
    param = Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="twice"):
        Apollo([("a", param), ("b", param)])
    with pytest.raises(ValueError, match=r"w is torch\.float16"):
        Apollo([("w", Parameter(torch.zeros(4, dtype=torch.float16)))])
