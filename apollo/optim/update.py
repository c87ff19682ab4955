"""The arithmetic of one tensor's update, in torch operations that run on any device.

    G --measure--> R = P G and the channels' |g|^2         reads G once, in blocks
                     |
                  rescale: moments, a factor per channel, limits      small: r x c
                     |
    W, G --write--> W <- W (1 - lr wd) - lr factor G, rounded         reads G and W, writes W
                                                                      and a bit where W changed

For Adam the direction is not G but comes from full-size moments. Knows no optimizer, names or
hooks. Nothing waits for the device: what is not finite is masked, and reported in a tensor.

Axes: r = rank, m = projected side, c = channels, i x j = rows x columns, b = rows of a block,
o = octets of columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from apollo.optim.changes import pack, words
from apollo.optim.philox import make_key
from apollo.optim.projection import draw_projection
from apollo.optim.rounding import round_stochastically, round_with_correction, undo_correction
from apollo.optim.routing import Plan

MAX_GRAD_NORM = 1e15
"""A gradient beyond this norm counts as not finite: its squares leave the range of float32."""
MIN_NORM = 1e-18
"""Floor of a divisor; the square of a smaller norm leaves the range of float32."""
CLIP_DECAY = 0.9
"""Decay of the running mean of a tensor's update norm."""
MAX_CLIP_GROWTH = 10.0
"""A norm enters that mean as at most this many means: one spike does not lift the limit, and a
tensor that had nearly no gradients for long is back within a few steps."""
BLOCK_ELEMENTS = 1 << 20
"""Elements of a block: temporaries of 4 MiB, which a second pass finds in a cache."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One tensor's step: what is read, and what is written in place."""

    param_ij: Tensor
    """float32 or bfloat16; written."""
    grad_ij: Tensor
    """Any floating type; read only."""
    state: State
    """What `make_state` made; written."""
    plan: Plan
    lr: float
    projection_seed: int
    """Of the projection in force; for the rule `projected`."""
    rounding_seed: int
    """Of this step's noise; for stochastic rounding."""
    changed_io: Tensor | None = None
    """Written, if there: which elements have other bits now, see `changes`."""


@dataclass(frozen=True)
class Now:
    """What changes from step to step, as tensors, so that compiled code stays valid."""

    lr: Tensor
    """0-dim float32."""
    key: Tensor | None
    """Of the rounding noise: the halves of a seed; for stochastic rounding."""
    changed_io: Tensor | None = None
    """As `Update.changed_io`."""


class Kernels(Protocol):
    """One implementation of the update."""

    def update(self, task: Update) -> Tensor:
        """Make the step; float32 [gradient norm, update norm / lr, factor of limits, is finite]."""
        ...

    def size_bytes(self) -> int:
        """Bytes held between steps."""
        ...


def make_state(plan: Plan, device: torch.device) -> State:
    """Zeros: counters as 0-dim tensors, moments in float32 whatever the weights are."""
    # Not float64: dynamo takes a 0-dim one on the CPU for a Python number, and loses its changes.
    state = {"step": torch.zeros((), dtype=torch.int64, device=device)}
    if plan.clip is not None:
        state["norm_mean"] = torch.zeros((), device=device)
    if plan.norm_growth is not None:
        state["norm_last"] = torch.zeros((), device=device)
    full = plan.rows, plan.columns
    if plan.rule == "projected":
        state["exp_avg"] = torch.zeros(plan.rank, plan.num_channels, device=device)
    elif plan.has_momentum:
        state["exp_avg"] = torch.zeros(full, device=device)
    if plan.rule != "neuron":
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
    if plan.rounding == "corrected":
        state["correction"] = torch.zeros(full, dtype=torch.int8, device=device)
    return state


class TorchKernels:
    """The update in torch operations. Keeps each projection until the next."""

    def __init__(self) -> None:
        self._projections: dict[int, tuple[int, Tensor]] = {}

    def update(self, task: Update) -> Tensor:
        """As `Kernels.update`."""
        plan, param_ij = task.plan, task.param_ij
        now = Now(lr=torch.tensor(task.lr), key=None, changed_io=task.changed_io)
        if plan.rounding == "stochastic":
            now = replace(now, key=make_key(task.rounding_seed, param_ij.device))
        return self.run(param_ij, task.grad_ij, task.state, self._projection(task), now, plan)

    def run(
        self,
        param_ij: Tensor,
        grad_ij: Tensor,
        state: State,
        projection_rm: Tensor | None,
        now: Now,
        plan: Plan,
    ) -> Tensor:
        """`step_tensor`, in blocks that stay in a cache."""
        num_rows = max(1, BLOCK_ELEMENTS // max(1, plan.columns))
        return step_tensor(param_ij, grad_ij, state, projection_rm, now, plan, num_rows)

    def size_bytes(self) -> int:
        """As `Kernels.size_bytes`."""
        return sum(projection_rm.nbytes for _, projection_rm in self._projections.values())

    def _projection(self, task: Update) -> Tensor | None:
        if task.plan.rule != "projected":
            return None
        place, plan = task.param_ij.data_ptr(), task.plan
        seed, projection_rm = self._projections.get(place, (None, None))
        if projection_rm is None or seed != task.projection_seed:
            device = task.param_ij.device
            projection_rm = draw_projection(task.projection_seed, plan.rank, plan.side, device)
            self._projections[place] = task.projection_seed, projection_rm
        return projection_rm


def step_tensor(
    param_ij: Tensor,
    grad_ij: Tensor,
    state: State,
    projection_rm: Tensor | None,
    now: Now,
    plan: Plan,
    num_rows: int,
) -> Tensor:
    """One tensor's step, `num_rows` rows at a time; returns what `Kernels.update` does."""
    projected_rc, squares_c = measure(grad_ij, projection_rm, plan.axis)
    norms_c = squares_c.sqrt()
    norm = torch.linalg.vector_norm(norms_c)
    is_finite = norm < MAX_GRAD_NORM
    state["step"].add_(is_finite)
    norms_c = torch.where(is_finite, norms_c, 0.0)

    direction_ij = grad_ij
    if projected_rc is not None:
        factor_c = rescale(projected_rc, state, is_finite, plan)
        update_norm = torch.linalg.vector_norm(factor_c * norms_c)
    elif plan.rule == "neuron":
        if plan.has_momentum:
            direction_ij = advance_mean(grad_ij.float(), state, is_finite, plan)
            norms_c = measure(direction_ij, None, plan.axis)[1].sqrt()
        factor_c = plan.alpha / norms_c.clamp_min(MIN_NORM)
        update_norm = torch.linalg.vector_norm(factor_c * norms_c)
    else:
        advance(grad_ij.float(), state, is_finite, plan)
        squares = [direction(state, plan, b).square().sum() for b in blocks(plan, num_rows)]
        factor_c, update_norm = torch.ones_like(norms_c), torch.stack(squares).sum().sqrt()

    limited = limit(update_norm, state, is_finite, plan)
    factor_ij = (factor_c * limited).unsqueeze(plan.axis)
    for rows in blocks(plan, num_rows):
        if plan.rule == "adam":
            direction_bj = direction(state, plan, rows)
        else:
            direction_bj = direction_ij[rows].float()
        factor_bj = factor_ij if plan.axis == 0 else factor_ij[rows]
        write(param_ij, rows, direction_bj, factor_bj, is_finite, state, now, plan)
    return torch.stack((norm, update_norm * limited, limited, is_finite.float()))


def blocks(plan: Plan, num_rows: int) -> Iterator[slice]:
    """All rows, as slices of at most `num_rows`."""
    for first in range(0, plan.rows, num_rows):
        yield slice(first, min(first + num_rows, plan.rows))


def measure(
    grad_ij: Tensor, projection_rm: Tensor | None, axis: int
) -> tuple[Tensor | None, Tensor]:
    """R_rc = P G (None without a projection), and the squared norms_c of the channels."""
    grad_ij = grad_ij.float()
    squares_c = grad_ij.square().sum(axis)
    if projection_rm is None:
        return None, squares_c
    return projection_rm @ (grad_ij if axis == 0 else grad_ij.T), squares_c


def advance_mean(value: Tensor, state: State, is_finite: Tensor, plan: Plan) -> Tensor:
    """Advance the first moment with `value`, unless the gradient is not finite; return it."""
    value = torch.where(is_finite, value, 0.0)
    return state["exp_avg"].lerp_(value, is_finite.float() * (1 - plan.beta1))


def advance(value: Tensor, state: State, is_finite: Tensor, plan: Plan) -> None:
    """Advance both of Adam's moments with `value`, unless the gradient is not finite."""
    value = torch.where(is_finite, value, 0.0)
    advance_mean(value, state, is_finite, plan)
    state["exp_avg_sq"].lerp_(value.square(), is_finite.float() * (1 - plan.beta2))


def direction(state: State, plan: Plan, rows: slice = slice(None)) -> Tensor:
    """Adam's bias-corrected M^ / (sqrt(V^) + eps)."""
    step = state["step"].clamp_min(1).double()
    unbias1, unbias2 = (1 - plan.beta1**step).float(), (1 - plan.beta2**step).float()
    root = (state["exp_avg_sq"][rows] / unbias2).sqrt_().add_(plan.eps)
    return (state["exp_avg"][rows] / unbias1).div_(root)


def rescale(projected_rc: Tensor, state: State, is_finite: Tensor, plan: Plan) -> Tensor:
    """Factor_c of the raw gradient: alpha |N_c| / |R_c|, or of whole N and R for rank 1."""
    projected_rc = torch.where(is_finite, projected_rc, 0.0)
    advance(projected_rc, state, is_finite, plan)
    dims = (0, 1) if plan.rank == 1 else (0,)
    before = torch.linalg.vector_norm(projected_rc, dim=dims).clamp_min_(MIN_NORM)
    after = torch.linalg.vector_norm(direction(state, plan), dim=dims)
    factor_c: Tensor = (after / before * plan.alpha).expand(plan.num_channels)
    return factor_c


def limit(norm: Tensor, state: State, is_finite: Tensor, plan: Plan) -> Tensor:
    """Factor, at most 1, that keeps an update of this norm within the plan's limits."""
    factor = torch.ones_like(norm)
    if plan.clip is not None:
        mean = torch.where(state["norm_mean"] > 0, state["norm_mean"], norm)
        grown = mean.lerp(torch.minimum(norm, MAX_CLIP_GROWTH * mean), 1 - CLIP_DECAY)
        state["norm_mean"].copy_(torch.where(is_finite, grown, state["norm_mean"]))
        factor = (plan.clip * mean / norm.clamp_min(MIN_NORM)).clamp_max(1.0)
    if plan.norm_growth is not None:
        last, limited = state["norm_last"], norm * factor
        growth = (plan.norm_growth * last / limited.clamp_min(MIN_NORM)).clamp_max(1.0)
        growth = torch.where(last > 0, growth, 1.0)
        # A norm of 0 would hold all later ones at 0.
        last.copy_(torch.where(is_finite & (limited > 0), limited * growth, last))
        factor = factor * growth
    return factor


def write(
    param_ij: Tensor,
    rows: slice,
    direction_bj: Tensor,
    factor_bj: Tensor,
    is_finite: Tensor,
    state: State,
    now: Now,
    plan: Plan,
) -> None:
    """param <- param * (1 - lr * weight_decay) - lr * factor * direction, rounded once.

    Where it is masked this adds -0.0, which changes no bit of any number.
    """
    param_bj = param_ij[rows]
    before_bj = None if now.changed_io is None else param_bj.clone()
    lr = is_finite.float() * now.lr
    value_bj = param_bj.float()  # itself where it is float32
    if plan.rounding == "corrected":
        value_bj = undo_correction(value_bj, state["correction"][rows])
    if plan.weight_decay:
        value_bj.mul_(1 - lr * plan.weight_decay)
    value_bj.addcmul_(torch.where(is_finite, direction_bj, 0.0), factor_bj * -lr)
    if plan.rounding == "stochastic":
        assert now.key is not None
        param_bj.copy_(round_stochastically(value_bj, now.key, rows.start))
    elif plan.rounding == "nearest":
        param_bj.copy_(value_bj)
    elif plan.rounding == "corrected":
        weight_bj, correction_bj = round_with_correction(value_bj)
        param_bj.copy_(weight_bj)
        state["correction"][rows].copy_(correction_bj)
    if now.changed_io is not None and before_bj is not None:
        now.changed_io[rows] |= pack(words(param_bj) != words(before_bj))
