"""Gaussian projections that are drawn again instead of stored; knows nothing of optimizers.

A projection is a pure function of (seed, tensor name, refresh index), so no checkpoint carries
one, and a restart or another device continues with the same numbers.

Axes: r = rank, m = smaller side of a matrix.
"""

import hashlib
import math

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """63-bit seed, a blake2b hash of `parts`; the same in every process, on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_projection(
    seed: int, name: str, refresh: int, rank: int, side: int, device: torch.device
) -> Tensor:
    """P_rm, float32, entries N(0, 1/r), so that E|P x|^2 = |x|^2 (arXiv:2412.05270, section 4).

    Drawn on the CPU and then moved: a CPU and a GPU get the same bits.
    """
    generator = torch.Generator().manual_seed(derive_seed("projection", seed, name, refresh))
    projection_rm = torch.randn(rank, side, generator=generator, dtype=torch.float32)
    return projection_rm.div_(math.sqrt(rank)).to(device)
