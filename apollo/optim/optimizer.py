"""APOLLO (arXiv:2412.05270), written from its equations; owns the optimizer's state.

It knows tensors and their names, not models, samples or jobs. A matrix G is read as m x n, m <= n;
the n indices of the larger side are its channels. Only r x n moments are kept:

    G_mn --P_rm--> R_rn --Adam's moments--> N_rn = M^ / (sqrt(V^) + eps)
      |                                       |
      |            s_n = |N_n| / |R_n|  <-----+     one factor per channel; rank 1: one per tensor
      v                                       v
    W <- W - lr * alpha * G * s * limits              the raw gradient, rescaled

|N_n| grows like sqrt(r) where Adam's own norm grows like sqrt(m), so alpha = sqrt(m / r) makes the
learning rate mean what it means for AdamW. `routing` says what gets this rule and what Adam itself.
Baselines of the same family: `mode="scale"` (SCALE, arXiv:2506.16659), `mode="adamw"`.

A step is either `step()`, or `begin_step`, a backward pass under the hooks of `release.attach`,
`end_step`. It never waits for the device: which gradients were not finite, and what the step did,
is read when somebody asks for `reports` or `skipped`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from apollo.optim.projection import projection_seed
from apollo.optim.rounding import ROUNDINGS, Rounding, rounding_seed
from apollo.optim.routing import MODES, ROLES, Mode, Role, make_plan
from apollo.optim.update import Kernels, TorchKernels, Update, make_state

SAMPLED_ELEMENTS = 1 << 14
"""Elements of a tensor that are compared before and after a step: the share that changed is known
within 0.4 %, at a cost that does not grow with the tensor."""


@dataclass(frozen=True)
class TensorReport:
    """What one step did to one tensor."""

    grad_norm: float
    """Not finite if the tensor was left alone."""
    update_rms: float
    """Root mean square of the update, over the learning rate; about 0.2 to 0.4 for AdamW."""
    limited: float
    """Factor of the clip and the norm-growth limiter; 1 where they did nothing."""
    changed: float
    """Share of the sampled elements whose stored bits changed: near 0 in bfloat16 is an alarm."""
    is_finite: bool
    """Whether the gradient was finite and the tensor was updated."""


class Apollo(torch.optim.Optimizer):
    """APOLLO over named parameters, which it updates in place, through their own storage.

    `params` are (name, parameter) pairs or groups `{"params": pairs, setting: value, ...}`; a group
    may override every setting but `seed`. Moments are float32 whatever the weights are; bfloat16
    weights are computed in float32 and rounded once. Raises ValueError that names the setting, its
    value and what is allowed.

    lr: AdamW's learning rate with `scale="auto"`.
    rank: of the projection; 1 is APOLLO-Mini; a matrix with no side above it gets Adam.
    scale: alpha, a number as the paper gives it, or "auto", sqrt(m / rank).
    update_proj_gap: steps between two projections; the moments are kept.
    clip: bounds an update's norm to so many running means of it; None turns it off.
    norm_growth: the paper's limiter (1.01 there); bounds it to so many times the last norm.
    weight_decay: decoupled; leaves vectors alone.
    rounding: of bfloat16 weights, see `rounding`; float32 weights are never rounded.
    role: a tensor's place in the model for `mode="scale"`, where its name does not say it.
    changed: maps in which a bit is set for each element that has changed, by parameter; see
        `changes`. Whoever has looked at one clears it.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Parameter]] | Iterable[dict[str, Any]],
        lr: float = 1e-5,
        *,
        mode: Mode = "apollo",
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-10,
        rank: int = 256,
        update_proj_gap: int = 200,
        scale: float | Literal["auto"] = "auto",
        clip: float | None = 3.0,
        norm_growth: float | None = None,
        weight_decay: float = 0.0,
        rounding: Rounding = "stochastic",
        role: Role = "auto",
        seed: int = 0,
        kernels: Kernels | None = None,
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        settings: dict[str, Any] = {"lr": lr, "mode": mode, "betas": betas, "eps": eps}
        settings |= {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        settings |= {"clip": clip, "norm_growth": norm_growth, "weight_decay": weight_decay}
        settings |= {"rounding": rounding, "role": role, "seed": seed, "num_steps": 0}
        self._names: dict[Tensor, str] = {}
        self._kernels = kernels or TorchKernels()
        self.changed: Mapping[str, Tensor] = changed or {}
        self._measured: list[tuple[str, int, Tensor]] = []
        self._reports: dict[str, TensorReport] | None = {}
        self.is_stepping = False
        """Whether a step is open: `begin_step` was called, `end_step` not yet."""
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; refuses unknown keys, bad values, and parameters without a unique name."""
        group = dict(param_group)
        group["params"] = pairs = list(group["params"])
        unknown = set(group) - set(self.defaults) - {"params"}
        if unknown:
            raise ValueError(
                f"unknown setting {sorted(unknown)[0]!r} in a parameter group; "
                f"known are {', '.join(sorted(set(self.defaults) - {'num_steps', 'seed'}))}"
            )
        if fixed := {"seed", "num_steps"} & set(group):
            raise ValueError(f"{min(fixed)} is set for the whole optimizer, not for a group")
        _check(self.defaults | group)
        for pair in pairs:
            if not isinstance(pair, tuple):
                raise ValueError(
                    "parameters need names, by which projections and rounding noise are drawn; "
                    "pass model.named_parameters()"
                )
            name, param = pair
            if name in self._names.values() or param in self._names:
                raise ValueError(f"{name} occurs twice; pass each name and tied parameter once")
            if param.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"{name} is {param.dtype}; use float32 or bfloat16 weights")
            self._names[param] = name
        super().add_param_group(group)
        self._find_groups()

    @property
    def num_steps(self) -> int:
        """Steps begun so far; drives the projections and the rounding noise."""
        return int(self.param_groups[0]["num_steps"])

    def name_of(self, param: Tensor) -> str:
        """The name under which a parameter was given."""
        return self._names[param]

    def begin_step(self, lr: float | None = None) -> None:
        """Open a step; `lr`, if given, is the learning rate of every group from now on."""
        if self.is_stepping:
            raise RuntimeError("the last step is still open; call end_step first")
        for group in self.param_groups:
            group["num_steps"] += 1
            if lr is not None:
                group["lr"] = lr
        self.is_stepping = True
        self._measured.clear()

    @torch.no_grad()
    def step_parameter(self, param: Tensor, grad: Tensor) -> None:
        """Update one parameter, once a step, from its complete gradient.

        A gradient that is not finite changes neither the parameter nor its state. Does not wait
        for the device.
        """
        if not self.is_stepping:
            raise RuntimeError("no step is open; call begin_step before the backward pass")
        name, group = self._names[param], self._group_of[param]
        plan = make_plan(name, tuple(param.shape), param.dtype == torch.bfloat16, group)
        state = self.state[param]
        if not state:
            state.update(make_state(plan, param.device))
        param_ij = param.view(plan.rows, plan.columns)
        sample = param_ij[:: max(1, param.numel() // SAMPLED_ELEMENTS)]
        before = sample.clone()
        refresh = (self.num_steps - 1) // group["update_proj_gap"]
        measured = self._kernels.update(
            Update(
                param_ij=param_ij,
                grad_ij=grad.reshape(plan.rows, plan.columns),
                state=state,
                plan=plan,
                lr=float(group["lr"]),
                projection_seed=projection_seed(group["seed"], name, refresh),
                rounding_seed=rounding_seed(group["seed"], self.num_steps, name),
                changed_io=self.changed.get(name),
            )
        )
        changed = (sample != before).float().mean()
        self._measured.append((name, param.numel(), torch.cat((measured, changed[None]))))

    def end_step(self) -> None:
        """Close a step; does not wait for the device."""
        if not self.is_stepping:
            raise RuntimeError("no step is open; call begin_step first")
        self.is_stepping = False
        self._reports = None

    @property
    def reports(self) -> dict[str, TensorReport]:
        """What the last finished step did, by parameter; the first look waits for the device."""
        if self._reports is None:
            numbers = [measured for _, _, measured in self._measured]
            rows = torch.stack([row.to(numbers[0].device) for row in numbers]) if numbers else None
            self._reports = {
                name: TensorReport(row[0], row[1] / math.sqrt(size), row[2], row[4], bool(row[3]))
                for (name, size, _), row in zip(
                    self._measured, rows.tolist() if rows is not None else [], strict=True
                )
            }
        return self._reports

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names that the last finished step left alone: their gradient was not finite."""
        return tuple(name for name, report in self.reports.items() if not report.is_finite)

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

    def size_bytes(self) -> int:
        """Bytes that the optimizer holds: its state, maps, and projections until their refresh."""
        tensors = [tensor for state in self.state.values() for tensor in state.values()]
        tensors += self.changed.values()
        num_bytes: int = sum(tensor.nbytes for tensor in tensors)
        return num_bytes + self._kernels.size_bytes()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but moments stay float32 where torch casts them to the weights' type.

        Settings come with the state. Raises ValueError if the parameters' names differ.
        """
        ours = [group["param_names"] for group in self.param_groups]
        theirs = [group.get("param_names") for group in state_dict["param_groups"]]
        if ours != theirs:
            raise ValueError("the state belongs to parameters of other names, order or groups")
        super().load_state_dict(dict(state_dict))
        for index, param in enumerate(self._names):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[param][key] = value.detach().to(param.device, copy=True)
        self._find_groups()

    def _find_groups(self) -> None:
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}


def _check(group: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first setting that cannot be."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value)

    lr, betas, scale = group["lr"], group["betas"], group["scale"]
    clip, growth = group["clip"], group["norm_growth"]
    rules = {
        "lr": ("a number, not negative", is_number(lr) and lr >= 0),
        "mode": (f"one of {', '.join(MODES)}", group["mode"] in MODES),
        "betas": ("two numbers in [0, 1)", len(betas) == 2 and all(0 <= b < 1 for b in betas)),
        "eps": ("positive", group["eps"] > 0),
        "rank": ("at least 1", group["rank"] >= 1),
        "update_proj_gap": ("at least 1", group["update_proj_gap"] >= 1),
        "scale": ("'auto' or positive", scale == "auto" or (is_number(scale) and scale > 0)),
        "clip": ("None or at least 1", clip is None or (is_number(clip) and clip >= 1)),
        "norm_growth": ("None or above 1", growth is None or (is_number(growth) and growth > 1)),
        "weight_decay": ("not negative", group["weight_decay"] >= 0),
        "rounding": (f"one of {', '.join(ROUNDINGS)}", group["rounding"] in ROUNDINGS),
        "role": (f"one of {', '.join(ROLES)}", group["role"] in ROLES),
    }
    for name, (allowed, is_fine) in rules.items():
        if not is_fine:
            raise ValueError(f"{name}={group[name]!r}: must be {allowed}")
