"""`WeightLayout`: where each checkpoint tensor lies inside the engine's weight memory.

Owns the map and its file format; refuses to know how the map was found (`record.py`) or how the
memory is shared (`memory.py`). A layout is data: JSON of names, numbers and handles.

    checkpoint tensor "model.layers.0.self_attn.k_proj.weight"
        -> block 0, byte 113_246_208, shape (192, 576), stride (576, 1), float32

A rank of a tensor-parallel engine holds boxes of tensors: such a view also says which box it is.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Final, Self

import torch

FORMAT: Final = 1
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Types that can be trained in place; everything else is refused by the tensor's name."""


class LayoutError(ValueError):
    """A tensor cannot be mapped exactly; the message starts with its name."""


def dtype_name(dtype: torch.dtype, tensor_name: str) -> str:
    """The layout's word for `dtype`; raises LayoutError for types that cannot be trained."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise LayoutError(
        f"{tensor_name}: type {dtype} cannot be trained in place; "
        f"use an unquantised model in one of {', '.join(DTYPES)}"
    )


@dataclass(frozen=True)
class Part:
    """Which box of a checkpoint tensor a view is; the box's size is the view's shape."""

    start: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of the checkpoint tensor."""


@dataclass(frozen=True)
class TensorView:
    """One checkpoint tensor as a view of a block; offsets in bytes, strides in elements."""

    name: str
    block: int
    offset_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    part: Part | None = None
    """None if the engine holds the whole tensor; a rank may hold several boxes of one tensor."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.num_elements * DTYPES[self.dtype].itemsize

    @property
    def is_one_to_one(self) -> bool:
        """Whether no two of its elements share memory, and its axes count upwards."""
        reach = 1
        for step, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size > 1:
                if step < reach:
                    return False
                reach += (size - 1) * step
        return True

    @property
    def end_bytes(self) -> int:
        """First byte after the last element."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset_bytes + (last + 1) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Block:
    """A piece of exported memory: a file's path on a CPU, an IPC handle on a GPU."""

    handle: str
    size_bytes: int


@dataclass(frozen=True)
class WeightLayout:
    """The whole map. Constructed only through `checked`, which refuses overlaps and overflow."""

    device: str
    blocks: tuple[Block, ...]
    tensors: tuple[TensorView, ...]
    padding_bytes: int = 0
    """Bytes of engine parameters that no checkpoint tensor owns: zeroed vocabulary padding."""

    @classmethod
    def checked(
        cls,
        device: str,
        blocks: tuple[Block, ...],
        tensors: tuple[TensorView, ...],
        padding_bytes: int = 0,
    ) -> Self:
        """Build a layout; raises LayoutError with the tensor's name if it is not one-to-one."""
        layout = cls(device, blocks, tensors, padding_bytes)
        layout._check()
        return layout

    def _check(self) -> None:
        seen: dict[str, list[TensorView]] = {}
        for view in self.tensors:
            _check_part(view, seen.setdefault(view.name, []))
            seen[view.name].append(view)
            if view.dtype not in DTYPES:
                raise LayoutError(f"{view.name}: type {view.dtype!r} is not one of {list(DTYPES)}")
            if not 0 <= view.block < len(self.blocks):
                raise LayoutError(f"{view.name}: block {view.block} does not exist")
            if len(view.shape) != len(view.stride) or min(view.shape, default=1) < 1:
                raise LayoutError(f"{view.name}: shape {view.shape} with stride {view.stride}")
            if not view.is_one_to_one:
                raise LayoutError(
                    f"{view.name}: overlaps itself or runs backwards (shape {view.shape}, "
                    f"stride {view.stride})"
                )
            if view.offset_bytes % DTYPES[view.dtype].itemsize:
                raise LayoutError(f"{view.name}: byte {view.offset_bytes} lies between elements")
            if view.offset_bytes < 0 or view.end_bytes > self.blocks[view.block].size_bytes:
                raise LayoutError(
                    f"{view.name}: bytes {view.offset_bytes} to {view.end_bytes} lie outside "
                    f"block {view.block} of {self.blocks[view.block].size_bytes} bytes"
                )
        ordered = sorted(self.tensors, key=lambda view: (view.block, view.offset_bytes))
        for before, after in pairwise(ordered):
            if before.block == after.block and after.offset_bytes < before.end_bytes:
                raise LayoutError(f"{after.name}: overlaps {before.name} in the engine's memory")

    def __iter__(self) -> Iterator[TensorView]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all mapped tensors."""
        return sum(view.size_bytes for view in self.tensors)

    def save(self, path: Path) -> None:
        """Write the layout as JSON; readers see it whole or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}))
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a layout and check it again; raises LayoutError on an unknown format."""
        data: dict[str, Any] = json.loads(path.read_text())
        if data.get("format") != FORMAT:
            raise LayoutError(f"{path.name}: format {data.get('format')!r}, expected {FORMAT}")
        return cls.checked(
            device=data["device"],
            blocks=tuple(Block(**block) for block in data["blocks"]),
            tensors=tuple(_read(view) for view in data["tensors"]),
            padding_bytes=data["padding_bytes"],
        )


def _check_part(view: TensorView, others: list[TensorView]) -> None:
    """Whether `view` is a sound part of its tensor, apart from the `others` of the same name."""
    part = view.part
    if part is None or any(other.part is None for other in others):
        if others:
            raise LayoutError(f"{view.name}: mapped twice")
        return
    box = f"box {view.shape} at {part.start}"
    if not len(part.start) == len(part.whole) == len(view.shape):
        raise LayoutError(f"{view.name}: {box} of {part.whole} is not a box")
    axes = list(zip(part.start, view.shape, part.whole, strict=True))
    if any(at < 0 or at + size > end for at, size, end in axes):
        raise LayoutError(f"{view.name}: {box} lies outside the tensor of {part.whole}")
    if view.shape == part.whole:
        raise LayoutError(f"{view.name}: is whole, and recorded as a part of itself")
    for other in others:
        assert other.part is not None
        if (other.part.whole, other.dtype) != (part.whole, view.dtype):
            raise LayoutError(f"{view.name}: its parts are of different tensors")
        if boxes_meet(part.start, view.shape, other.part.start, other.shape):
            raise LayoutError(f"{view.name}: mapped twice, in part: {box}")


def boxes_meet(
    start: tuple[int, ...], size: tuple[int, ...], at: tuple[int, ...], length: tuple[int, ...]
) -> bool:
    """Whether the box of `size` at `start` shares an element with the one of `length` at `at`."""
    return all(a < b + m and b < a + n for a, n, b, m in zip(start, size, at, length, strict=True))


def _read(view: dict[str, Any]) -> TensorView:
    """A view as JSON gives it, where every tuple is a list."""
    part = view.pop("part", None)
    if part is not None:
        part = Part(tuple(part["start"]), tuple(part["whole"]))
    shape, stride = tuple(view.pop("shape")), tuple(view.pop("stride"))
    return TensorView(**view, shape=shape, stride=stride, part=part)
