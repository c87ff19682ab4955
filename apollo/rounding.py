"""Unbiased rounding of float32 results into a bfloat16 weight; knows nothing of optimizers.

A float32 value is a bfloat16 value plus 16 more bits of mantissa. Adding a uniform 16-bit integer
to its bits and cutting those 16 bits off rounds away from zero with exactly the probability that
the cut part says. A value that is already a bfloat16 stays what it is.
"""

import torch
from torch import Tensor

from apollo.projection import derive_seed

LOW_BITS = 16


def write_rounded(target: Tensor, value: Tensor, seed: int, step: int, name: str) -> None:
    """Write float32 `value` into bfloat16 `target`, in place; `value` is used up.

    The noise is a function of (seed, step, name) and of the kind of device: torch's CPU and CUDA
    generators differ.
    """
    assert target.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    generator = torch.Generator(value.device)
    generator.manual_seed(derive_seed("rounding", seed, step, name))
    noise = torch.empty_like(value, dtype=torch.int32)
    noise.random_(0, 1 << LOW_BITS, generator=generator)
    value.view(torch.int32).add_(noise).bitwise_and_(-(1 << LOW_BITS))
    target.copy_(value)
