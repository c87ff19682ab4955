"""Boxes of a tensor, where each lies in memory, and the one strided view that they form together.

    box of rows 0..2 at byte 0      box of rows 2..5 at byte 48      -->  rows 0..5, one view
    the same of an axis, of several axes, and of a rank's box of a larger tensor

Pure arithmetic on shapes, strides and offsets. Knows neither who copies a tensor in pieces
(`record.py`) nor who joins several tensors to one parameter (`names.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from apollo.weights.layout import DTYPES, LayoutError, Part, TensorView, boxes_meet


@dataclass(frozen=True)
class Piece:
    """A box of a tensor and where it lies. Axes of one element carry no stride."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    block: int
    offset_bytes: int
    strides: tuple[int | None, ...]


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor begins; on the meta device a number that behaves like an address.

    Two meta tensors are as far apart as their storage says, and in another storage out of reach.
    Valid, like an address, as long as the storage lives.
    """
    if not tensor.is_meta:
        return tensor.data_ptr()
    storage: int = tensor.untyped_storage()._cdata
    return (storage << 64) + int(tensor.storage_offset()) * tensor.itemsize


def box_of(
    name: str, whole: torch.Tensor, origin: torch.Tensor, target: torch.Tensor
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int | None, ...]]:
    """Which box of `whole` its view `origin` is, and the target's stride along each of its axes.

    Raises LayoutError if `origin` is no box: transposed, reshaped or strided.
    """
    if not whole.is_contiguous():
        raise LayoutError(f"{name}: the checkpoint reader gave a tensor that is not contiguous")
    flat = (address_of(origin) - address_of(whole)) // whole.element_size()
    start = []
    for step in whole.stride():
        start.append(flat // step)
        flat %= step
    size = [1] * whole.dim()
    strides: list[int | None] = [None] * whole.dim()
    axis = 0
    for length, step, target_step in zip(
        origin.shape, origin.stride(), target.stride(), strict=True
    ):
        if length == 1:
            continue
        while axis < whole.dim() and (whole.stride(axis) != step or whole.size(axis) == 1):
            axis += 1
        if axis == whole.dim():
            raise LayoutError(
                f"{name}: the loader reads it transposed or reshaped; "
                "a transformed tensor cannot be taught in place"
            )
        size[axis], strides[axis] = length, target_step
        axis += 1
    if any(at + n > end for at, n, end in zip(start, size, whole.shape, strict=True)):
        raise LayoutError(f"{name}: the loader reads it reshaped, across its rows")
    return tuple(start), tuple(size), tuple(strides)


def merge(name: str, shape: tuple[int, ...], dtype: str, pieces: Sequence[Piece]) -> TensorView:
    """One view of all pieces, which must tile the tensor without gap or overlap.

    Raises LayoutError, beginning with `name`, if they do not, or if they form no strided view.
    """
    itemsize = DTYPES[dtype].itemsize
    if len({piece.block for piece in pieces}) > 1:
        raise LayoutError(f"{name}: lies in several blocks of memory")
    if sum(prod(piece.size) for piece in pieces) != prod(shape) or _overlap(pieces):
        raise LayoutError(f"{name}: the loader copies some of its elements twice or never")
    stride = [_stride_along(name, axis, shape, pieces, itemsize) for axis in range(len(shape))]
    first = min(pieces, key=lambda piece: piece.start)
    base = first.offset_bytes - _offset(first, stride, itemsize)
    for piece in pieces:
        if piece.offset_bytes - _offset(piece, stride, itemsize) != base:
            raise LayoutError(f"{name}: its pieces do not form one strided view in the engine")
    kept = [step for step, length in zip(stride, shape, strict=True) if length > 1]
    if kept != sorted(kept, reverse=True):
        raise LayoutError(f"{name}: lies transposed in the engine's memory")
    return TensorView(name, first.block, base, shape, tuple(stride), dtype)


def merge_parts(
    name: str, whole: tuple[int, ...], dtype: str, pieces: Sequence[Piece]
) -> list[TensorView]:
    """What a rank holds of a tensor: all of it, one box of it, or several boxes of it.

    The pieces' bounding box is one view if they tile it; otherwise each piece is a view.
    """
    axes = range(len(whole))
    low = tuple(min(piece.start[axis] for piece in pieces) for axis in axes)
    high = tuple(max(piece.start[axis] + piece.size[axis] for piece in pieces) for axis in axes)
    size = _minus(high, low)
    if sum(prod(piece.size) for piece in pieces) != prod(size):
        return [view for piece in pieces for view in merge_parts(name, whole, dtype, [piece])]
    moved = [replace(piece, start=_minus(piece.start, low)) for piece in pieces]
    view = merge(name, size, dtype, moved)
    return [view if size == whole else replace(view, part=Part(low, whole))]


def _minus(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(one, other, strict=True))


def _offset(piece: Piece, stride: list[int], itemsize: int) -> int:
    return sum(at * step for at, step in zip(piece.start, stride, strict=True)) * itemsize


def _stride_along(
    name: str, axis: int, shape: tuple[int, ...], pieces: Sequence[Piece], itemsize: int
) -> int:
    """Stride in elements: as a piece states it, or from the distance of neighbouring pieces."""
    if shape[axis] == 1:
        return 1
    stated = {piece.strides[axis] for piece in pieces} - {None}
    if len(stated) == 1:
        return int(stated.pop() or 0)
    if not stated:
        line = [p for p in pieces if _others(p.start, axis) == _others(pieces[0].start, axis)]
        low = min(line, key=lambda piece: piece.start[axis])
        high = max(line, key=lambda piece: piece.start[axis])
        distance = (high.offset_bytes - low.offset_bytes) // itemsize
        if high is not low:
            return distance // (high.start[axis] - low.start[axis])
    raise LayoutError(f"{name}: its pieces have different strides along axis {axis}")


def _others(start: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return start[:axis] + start[axis + 1 :]


def _overlap(pieces: Sequence[Piece]) -> bool:
    return any(
        boxes_meet(one.start, one.size, other.start, other.size)
        for at, one in enumerate(pieces)
        for other in pieces[at + 1 :]
    )
