"""Which elements of a weight hold other bits than when somebody last looked: one bit for each.

    step --writes W--> changed_io |= (bits before != bits after)      in the pass that writes W
    take --> the changed values, in order, and a copy of changed_io; then all is unchanged

So what a commit moves off the device is what changed and a bit for every element, not the model.
A bit stays set when an element returns to what it was: the value is moved once more, no harm.

Axes: i x j = rows x columns of the weight, o = octets of columns; bit b of octet o is column 8o+b.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

PER_OCTET: Final = 8
_WORDS: Final = {2: torch.int16, 4: torch.int32}


class Taken(NamedTuple):
    """What had changed of one weight, on its device."""

    values: Tensor
    """The changed elements in row-major order, of the weight's type."""
    changed_io: Tensor


def map_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of changed_io: rows and octets."""
    return rows, -(-columns // PER_OCTET)


def make_map(rows: int, columns: int, device: torch.device) -> Tensor:
    """uint8 changed_io with no bit set."""
    return torch.zeros(map_shape(rows, columns), dtype=torch.uint8, device=device)


def words(value: Tensor) -> Tensor:
    """The bits of float32 or bfloat16 numbers as integers, in the same memory."""
    return value.view(_WORDS[value.itemsize])


def pack(is_changed_ij: Tensor) -> Tensor:
    """uint8 changed_io of a bool matrix."""
    padding = -is_changed_ij.shape[1] % PER_OCTET
    bits = torch.nn.functional.pad(is_changed_ij, (0, padding)).unflatten(1, (-1, PER_OCTET))
    places = torch.arange(PER_OCTET, device=bits.device)
    octets_io: Tensor = (bits.int() << places).sum(2, dtype=torch.int32)
    return octets_io.to(torch.uint8)


def unpack(changed_io: Tensor, columns: int) -> Tensor:
    """The bool matrix of a map."""
    places = torch.arange(PER_OCTET, device=changed_io.device, dtype=torch.uint8)
    bits = changed_io.unsqueeze(2) >> places & 1
    return bits.flatten(1)[:, :columns].bool()


def take(param_ij: Tensor, changed_io: Tensor) -> Taken:
    """What has changed until now; clears the map. Waits for the device, to learn how much."""
    is_changed_ij = unpack(changed_io, param_ij.shape[1])
    taken = Taken(param_ij[is_changed_ij], changed_io.clone())
    changed_io.zero_()
    return taken


def put(param_ij: Tensor, taken: Taken) -> None:
    """Bring an older copy of the weight, on any device, to what was taken."""
    is_changed_ij = unpack(taken.changed_io.to(param_ij.device), param_ij.shape[1])
    param_ij[is_changed_ij] = taken.values.to(param_ij.device)
