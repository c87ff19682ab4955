"""Which rule updates which tensor: pure questions about shapes, names and settings.

A tensor is read as a matrix of rows and columns: a vector is one row, three and more axes are
flattened to (all but the last) x last, which makes a stack of experts one tall matrix.

| mode   | tensor                                                        | rule      |
|--------|---------------------------------------------------------------|-----------|
| apollo | matrix, embedding, head: smaller side above the rank          | projected |
| apollo | stack of matrices, every side above the rank (last projected) | projected |
| apollo | the rest: vectors, conv1d, matrices not above the rank        | adam      |
| scale  | matrix: per output neuron (column of an embedding, else row)  | neuron    |
| scale  | the same of the output head, with momentum                    | neuron    |
| scale  | vectors, and stacks with a side of 8 or less                  | adam      |
| adamw  | everything                                                    | adam      |

A rank not below a matrix's smaller side would store what Adam stores and know less: the rank is
clamped there to "all of it", which is Adam.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from apollo.optim.rounding import Rounding

Mode = Literal["apollo", "scale", "adamw"]
Role = Literal["auto", "embedding", "head", "hidden"]
MODES: tuple[Mode, ...] = ("apollo", "scale", "adamw")
ROLES: tuple[Role, ...] = ("auto", "embedding", "head", "hidden")
MIN_NEURON_SIDE = 8
"""A stack of matrices with a side of at most this many is a convolution's kernel."""


@dataclass(frozen=True)
class Plan:
    """How one tensor is updated; hashable, so that compiled code is made once per plan."""

    rule: Literal["projected", "neuron", "adam"]
    rows: int
    columns: int
    axis: int = 0
    """Axis of the matrix that is summed over: projected away, or a neuron's inputs."""
    rank: int = 0
    alpha: float = 1.0
    has_momentum: bool = True
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-10
    clip: float | None = None
    norm_growth: float | None = None
    weight_decay: float = 0.0
    rounding: Rounding | Literal["none"] = "none"

    @property
    def num_channels(self) -> int:
        """Length of the axis that keeps its own scale."""
        return (self.rows, self.columns)[1 - self.axis]

    @property
    def side(self) -> int:
        """Length of the axis that is summed over."""
        return (self.rows, self.columns)[self.axis]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns as which a tensor is read."""
    columns = shape[-1] if shape else 1
    return math.prod(shape[:-1]), columns


def role_of(name: str) -> Role:
    """What a parameter's name says of its place in a language model."""
    parts = name.lower().split(".")
    if any(part in ("lm_head", "embed_out", "output_projection") for part in parts):
        return "head"
    if any(part.startswith("embed") or part in ("wte", "wpe") for part in parts):
        return "embedding"
    return "hidden"


def make_plan(
    name: str, shape: tuple[int, ...], is_rounded: bool, group: Mapping[str, Any]
) -> Plan:
    """The plan of tensor `name` under the settings of its group."""
    rows, columns = matrix_shape(shape)
    beta1, beta2 = group["betas"]
    common: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "beta1": beta1,
        "beta2": beta2,
        "eps": group["eps"],
        "clip": group["clip"],
        "norm_growth": group["norm_growth"],
        "weight_decay": group["weight_decay"] if len(shape) > 1 else 0.0,
        "rounding": group["rounding"] if is_rounded else "none",
    }
    mode, rank, scale = group["mode"], group["rank"], group["scale"]
    if mode == "apollo" and len(shape) > 1 and min(shape[-2:]) > rank:
        axis = 0 if len(shape) == 2 and rows <= columns else 1
        alpha = math.sqrt((rows, columns)[axis] / rank) if scale == "auto" else scale
        return Plan("projected", **common, axis=axis, rank=rank, alpha=alpha)
    if mode == "scale" and (
        len(shape) == 2 or (len(shape) > 2 and min(shape[-2:]) > MIN_NEURON_SIDE)
    ):
        role = role_of(name) if group["role"] == "auto" else group["role"]
        axis = 0 if role == "embedding" else 1
        alpha = math.sqrt((rows, columns)[axis]) if scale == "auto" else scale
        return Plan("neuron", **common, axis=axis, alpha=alpha, has_momentum=role == "head")
    return Plan("adam", **common)
