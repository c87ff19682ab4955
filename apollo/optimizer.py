"""Channel-wise APOLLO (arXiv:2412.05270), written from its equations; owns the optimizer's state.

It knows tensors and their names, not models, samples or jobs. A matrix G is read as m x n, m <= n;
the n indices of the larger side are its channels. Only r x n moments are kept:

    G_mn --P_rm--> R_rn --Adam's moments--> N_rn = M^ / (sqrt(V^) + eps)
      |                                       |
      |            s_n = |N_n| / |R_n|  <-----+     one factor per channel
      v                                       v
    W <- W - lr * alpha * G * s * clip              the raw gradient, rescaled

|N_n| grows like sqrt(r) where Adam's own norm grows like sqrt(m), so alpha = sqrt(m / r) makes the
learning rate mean what it means for AdamW. Vectors, tensors of three and more axes, and matrices
whose smaller side is not above the rank get Adam itself.

A step is either `step()`, or `begin_step`, a backward pass under the hooks of `attach`, `end_step`.
A gradient that is not finite is masked on the device, and the names are read once in `end_step`,
so that a step on a GPU waits for the GPU once, not once per tensor.

Axes: r = rank, m = smaller side, n = larger side (channels).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from apollo.projection import draw_projection
from apollo.rounding import write_rounded

MAX_GRAD_NORM = 1e15
"""A gradient beyond this norm counts as not finite: its squares leave the range of float32."""
MIN_NORM = 1e-18
"""Floor of a divisor; the square of a smaller norm leaves the range of float32."""
CLIP_DECAY = 0.9
"""Decay of the running mean of a tensor's update norm."""
MAX_CLIP_GROWTH = 10.0
"""A norm enters that mean as at most this many means: one spike does not lift the limit, and a
tensor that had nearly no gradients for long is back within a few steps."""


class Apollo(torch.optim.Optimizer):
    """APOLLO over named parameters, which it updates in place, through their own storage.

    Moments are float32 whatever the weights are; bfloat16 weights are computed in float32 and
    rounded once, stochastically. Weight decay is decoupled and leaves vectors alone. `clip` bounds
    the norm of a tensor's update to that many running means of it; None turns that off. Raises
    ValueError that names the setting and its value.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        lr: float = 1e-5,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-10,
        rank: int = 64,
        update_proj_gap: int = 200,
        scale: float | Literal["auto"] = "auto",
        weight_decay: float = 0.0,
        clip: float | None = 3.0,
        seed: int = 0,
    ) -> None:
        checks = {
            f"betas={betas}: each must be in [0, 1)": all(0 <= beta < 1 for beta in betas),
            f"eps={eps}: must be positive": eps > 0,
            f"rank={rank}: must be at least 2": rank >= 2,
            f"update_proj_gap={update_proj_gap}: must be at least 1": update_proj_gap >= 1,
            f"scale={scale!r}: must be 'auto' or positive": scale == "auto" or scale > 0,
            f"weight_decay={weight_decay}: must not be negative": weight_decay >= 0,
            f"clip={clip}: must be None or at least 1": clip is None or clip >= 1,
        }
        for complaint, is_fine in checks.items():
            if not is_fine:
                raise ValueError(complaint)
        pairs = list(named_parameters)
        self._names: dict[Tensor, str] = {param: name for name, param in pairs}
        if len(self._names) < len(pairs) or len(set(self._names.values())) < len(pairs):
            raise ValueError("a parameter or a name occurs twice; pass each tied parameter once")
        for name, param in pairs:
            if param.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{name} is {param.dtype}; use float32 or bfloat16 weights")
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "rank": rank}
        defaults |= {"update_proj_gap": update_proj_gap, "scale": scale, "seed": seed}
        defaults |= {"weight_decay": weight_decay, "clip": clip, "num_steps": 0}
        super().__init__([param for _, param in pairs], defaults)
        self._projections: dict[str, tuple[int, Tensor]] = {}
        self._flags: list[tuple[str, Tensor]] = []
        self.skipped: tuple[str, ...] = ()
        """Names whose gradient was not finite in the last finished step."""
        self.num_updated = 0
        """Number of parameters that the last finished step updated."""

    @property
    def num_steps(self) -> int:
        """Steps begun so far; drives the projections and the rounding noise."""
        return int(self.param_groups[0]["num_steps"])

    def begin_step(self, lr: float | None = None) -> None:
        """Open a step; its learning rate is `lr` if given."""
        group = self.param_groups[0]
        if lr is not None:
            group["lr"] = lr
        group["num_steps"] += 1
        self._flags.clear()

    @torch.no_grad()
    def step_parameter(self, param: Tensor, grad: Tensor) -> None:
        """Update one parameter from its complete gradient, which is used up.

        A gradient that is not finite changes neither the parameter nor its state. Does not wait
        for the device.
        """
        state = self.state[param] or self._make_state(param)
        grad = grad.float()
        norm_axis = self._small_axis(param)
        channel_norms = grad.square().sum(norm_axis).sqrt_()
        is_finite = torch.linalg.vector_norm(channel_norms) < MAX_GRAD_NORM
        self._flags.append((self._names[param], is_finite))
        grad.masked_fill_(~is_finite, 0.0)
        state["step"] += is_finite

        if norm_axis is None:
            direction = self._adam(state, grad, is_finite).masked_fill_(~is_finite, 0.0)
            factor = torch.ones_like(channel_norms)
            update_norm = torch.linalg.vector_norm(direction)
        else:
            channel_norms.masked_fill_(~is_finite, 0.0)
            projection_rm = self._projection(param, norm_axis)
            projected_rn = projection_rm @ (grad if norm_axis == 0 else grad.T)
            adam_rn = self._adam(state, projected_rn, is_finite)
            projected_norms = torch.linalg.vector_norm(projected_rn, dim=0).clamp_min_(MIN_NORM)
            scale_n = torch.linalg.vector_norm(adam_rn, dim=0).div_(projected_norms)
            factor = scale_n.mul_(self._alpha(param.shape[norm_axis]))
            update_norm = torch.linalg.vector_norm(factor * channel_norms)
            factor, direction = factor.unsqueeze(norm_axis), grad
        factor = factor * self._clip(state, update_norm, is_finite)
        self._write(param, direction, factor, is_finite)

    def end_step(self) -> tuple[str, ...]:
        """Close a step and return the names that it left out; waits for the device."""
        flags = torch.stack([flag for _, flag in self._flags]).tolist() if self._flags else []
        self.skipped = tuple(
            name for (name, _), is_finite in zip(self._flags, flags, strict=True) if not is_finite
        )
        self.num_updated = len(flags) - len(self.skipped)
        return self.skipped

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One ordinary step over every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin_step()
        for param in self._names:
            if param.grad is not None:
                self.step_parameter(param, param.grad)
        self.end_step()
        return loss

    def attach(self) -> list[RemovableHandle]:
        """Update each parameter as soon as its gradient is complete, and free the gradient.

        In force until the returned handles are removed. A tied gradient is complete with its last
        use.
        """

        def consume(param: Tensor) -> None:
            assert param.grad is not None
            self.step_parameter(param, param.grad)
            param.grad = None

        return [param.register_post_accumulate_grad_hook(consume) for param in self._names]

    def state_bytes(self) -> int:
        """Bytes that the optimizer holds: its state, and the projections until their refresh."""
        tensors = [tensor for state in self.state.values() for tensor in state.values()]
        tensors += [projection_rm for _, projection_rm in self._projections.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but moments stay float32 where torch casts them to the weights' type."""
        super().load_state_dict(dict(state_dict))
        for index, param in enumerate(self._names):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[param][key] = value.detach().to(param.device, copy=True)

    def _small_axis(self, param: Tensor) -> int | None:
        """Axis of a matrix that is projected away; None for what gets plain Adam."""
        if param.ndim != 2 or min(param.shape) <= self.param_groups[0]["rank"]:
            return None
        return 0 if param.shape[0] <= param.shape[1] else 1

    def _make_state(self, param: Tensor) -> dict[str, Tensor]:
        axis = self._small_axis(param)
        rank = self.param_groups[0]["rank"]
        shape = param.shape if axis is None else (rank, param.shape[1 - axis])
        state: dict[str, Tensor] = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float64, device=param.device)
        state["exp_avg"] = torch.zeros(shape, dtype=torch.float32, device=param.device)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        state["norm_mean"] = torch.zeros((), dtype=torch.float32, device=param.device)
        return state

    def _projection(self, param: Tensor, axis: int) -> Tensor:
        group, name = self.param_groups[0], self._names[param]
        refresh = (self.num_steps - 1) // group["update_proj_gap"]
        known = self._projections.get(name)
        if known is None or known[0] != refresh:
            side = param.shape[axis]
            known = (
                refresh,
                draw_projection(group["seed"], name, refresh, group["rank"], side, param.device),
            )
            self._projections[name] = known
        return known[1]

    def _alpha(self, side: int) -> float:
        group = self.param_groups[0]
        scale: float | str = group["scale"]
        return math.sqrt(side / group["rank"]) if isinstance(scale, str) else scale

    def _adam(self, state: dict[str, Tensor], value: Tensor, is_finite: Tensor) -> Tensor:
        """Advance the moments with `value` and return Adam's bias-corrected direction."""
        beta1, beta2 = self.param_groups[0]["betas"]
        mean, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"].clamp_min(1)
        mean.lerp_(value, is_finite.float() * (1 - beta1))
        square.lerp_(value.square(), is_finite.float() * (1 - beta2))
        root = (square / (1 - beta2**step)).sqrt_().add_(self.param_groups[0]["eps"])
        direction: Tensor = (mean / (1 - beta1**step)).div_(root)
        return direction

    def _clip(self, state: dict[str, Tensor], norm: Tensor, is_finite: Tensor) -> Tensor:
        """Factor, at most 1, that keeps `norm` within `clip` running means of it."""
        clip: float | None = self.param_groups[0]["clip"]
        if clip is None:
            return torch.ones_like(norm)
        mean = torch.where(state["norm_mean"] > 0, state["norm_mean"], norm)
        grown = mean.lerp(torch.minimum(norm, MAX_CLIP_GROWTH * mean), 1 - CLIP_DECAY)
        state["norm_mean"].copy_(torch.where(is_finite, grown, state["norm_mean"]))
        return (clip * mean / norm.clamp_min(MIN_NORM)).clamp_max_(1.0)

    def _write(self, param: Tensor, direction: Tensor, factor: Tensor, is_finite: Tensor) -> None:
        """param <- param * (1 - lr * weight_decay) - lr * direction * factor.

        Where the mask is 0 this adds -0.0, which changes no bit of any number.
        """
        group = self.param_groups[0]
        lr = is_finite.float() * group["lr"]
        value = param if param.dtype == torch.float32 else param.float()
        if group["weight_decay"] and param.ndim > 1:
            value.mul_(1 - lr * group["weight_decay"])
        value.addcmul_(direction, factor * -lr)
        if value is not param:
            write_rounded(param, value, group["seed"], self.num_steps, self._names[param])
