"""Gaussian projections that are drawn again instead of stored; knows nothing of optimizers.

A projection is a pure function of (seed, tensor name, refresh index), so no checkpoint carries
one, and a restart or another device continues with the same bits.

Axes: r = rank, m = the side of a matrix that is projected away.
"""

import functools
import math

import torch
from torch import Tensor

from apollo.optim.philox import LOW_16, derive_seed, make_key, uniform_16


@functools.cache
def normal_table() -> Tensor:
    """N(0, 1) at the middles of 65536 equal shares of probability, float32, on the CPU.

    Its values are rounded to bfloat16, so that a tensor core multiplies them exactly; the variance
    is 1 within 1e-3.
    """
    shares = (torch.arange(LOW_16 + 1, dtype=torch.float64) + 0.5) / (LOW_16 + 1)
    normal: Tensor = torch.special.ndtri(shares).bfloat16().float()
    return normal


def projection_seed(seed: int, name: str, refresh: int) -> int:
    """Seed of one tensor's projection between two refreshes."""
    return derive_seed("projection", seed, name, refresh)


def draw_projection(seed: int, rank: int, side: int, device: torch.device) -> Tensor:
    """P_rm, float32, entries N(0, 1/r), so that E|P x|^2 = |x|^2 (arXiv:2412.05270, section 4)."""
    places = uniform_16(make_key(seed, device), 0, rank, side)
    projection_rm: Tensor = normal_table().to(device)[places].div_(math.sqrt(rank))
    return projection_rm
