"""From an updated float32 value back to a bfloat16 weight; knows nothing of optimizers.

A float32 value is a bfloat16 value plus 16 more bits of mantissa:

    stochastic  adds a uniform 16-bit number and cuts those bits off: unbiased, nothing is stored
    nearest     loses most of a small step: for comparison
    corrected   keeps 8 of the 16 bits in an int8 tensor: weight + correction = 24 bits of the value

A value that is a bfloat16 already stays what it is in all three.
"""

from typing import Literal

import torch
from torch import Tensor

from apollo.optim.philox import derive_seed, uniform_16

Rounding = Literal["stochastic", "nearest", "corrected"]
ROUNDINGS: tuple[Rounding, ...] = ("stochastic", "nearest", "corrected")
LOW_BITS = 16
CORRECTION_BITS = 8


def rounding_seed(seed: int, step: int, name: str) -> int:
    """Seed of the rounding noise of one tensor in one step."""
    return derive_seed("rounding", seed, step, name)


def round_stochastically(value_ij: Tensor, key: Tensor, first_row: int) -> Tensor:
    """bfloat16 of float32 `value_ij`, up or down with the probability that the cut bits say.

    The noise of an element is a function of the key and of its place: rows count from `first_row`.
    """
    noise = uniform_16(key, first_row, *value_ij.shape)
    bits = value_ij.view(torch.int32) + noise & -(1 << LOW_BITS)
    return bits.view(torch.float32).to(torch.bfloat16)


def round_with_correction(value: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest bfloat16 of float32 `value`, and int8 `correction` with the next 8 bits."""
    dropped = LOW_BITS - CORRECTION_BITS
    bits_24 = value.view(torch.int32) + (1 << dropped - 1) >> dropped
    weight_16 = bits_24 + (1 << CORRECTION_BITS - 1) >> CORRECTION_BITS
    correction = bits_24 - (weight_16 << CORRECTION_BITS)
    weight = (weight_16 << LOW_BITS).view(torch.float32).to(torch.bfloat16)
    return weight, correction.to(torch.int8)


def undo_correction(weight: Tensor, correction: Tensor) -> Tensor:
    """The float32 value whose upper 24 bits `round_with_correction` kept."""
    bits = weight.float().view(torch.int32)
    return (bits + (correction.to(torch.int32) << LOW_BITS - CORRECTION_BITS)).view(torch.float32)
