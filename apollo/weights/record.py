"""Finds a `WeightLayout` by watching a model's own loader copy a checkpoint into its parameters.

vLLM fuses, shards and pads tensors differently per architecture and version; its loader is the only
description of that which is always right. So nothing is assumed: every `copy_` into the weights is
recorded, traced back to the checkpoint tensor it read, and merged into one strided view.

    checkpoint iterator --(name, tensor)--> model.load_weights --aten.copy_--> weight memory
              |                                                      |
              +-- source intervals (data_ptr) ----- Recorder --------+--> pieces -> TensorView

Whatever does not trace back (a transformed, repacked or computed tensor) is an error with its name.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apollo.weights.layout import LayoutError, TensorView, dtype_name

MAX_LIVE_SOURCES: Final = 64
"""Checkpoint tensors whose addresses are remembered; a loader uses a tensor soon after it came."""

_aten = torch.ops.aten
_FILLS: Final = (_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default)


@dataclass(frozen=True)
class Span:
    """A block of weight memory, by address: engine parameter names and the block they lie in."""

    name: str
    block: int
    address: int
    size_bytes: int
    block_offset_bytes: int


@dataclass(frozen=True)
class _Source:
    name: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class _Piece:
    """A box of a checkpoint tensor and where it was copied to. Size-1 axes carry no stride."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    block: int
    offset_bytes: int
    strides: tuple[int | None, ...]


class Recorder(TorchDispatchMode):
    """Watches writes into `spans` while a loader runs; `views` then gives the map.

    Use `watch` around the checkpoint iterator, and the recorder itself as a context manager around
    the loader. Raises LayoutError as soon as a write cannot be explained.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spans = sorted(spans, key=lambda span: span.address)
        self._live: deque[_Source] = deque(maxlen=MAX_LIVE_SOURCES)
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._filled: dict[str, int] = {}

    def watch(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass a checkpoint through, remembering what each tensor is called."""
        for name, tensor in weights:
            if name in self._shapes:
                raise LayoutError(f"{name}: appears twice in the checkpoint")
            self._shapes[name] = (tuple(tensor.shape), tensor.dtype)
            self._live.append(_Source(name, tensor))
            yield name, tensor

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            written = args[0] if args and isinstance(args[0], torch.Tensor) else None
            if written is not None and (span := self._span_of(written)) is not None:
                self._note(func, span, written, args)
        return result

    def _note(self, func: Any, span: Span, written: torch.Tensor, args: tuple[Any, ...]) -> None:
        if func in _FILLS:
            self._filled[span.name] = self._filled.get(span.name, 0) + written.nbytes
        elif func is _aten.copy_.default:
            self._copy(span, written, args[1])
        else:
            raise LayoutError(
                f"{self._latest()}: the loader changes it with {func} while writing "
                f"{span.name}; a transformed tensor cannot be taught in place"
            )

    def _copy(self, span: Span, target: torch.Tensor, origin: torch.Tensor) -> None:
        source = self._source_of(origin)
        if source is None:
            raise LayoutError(
                f"{self._latest()}: what the loader writes into {span.name} is not the tensor "
                "of the checkpoint but computed from it; a transformed tensor cannot be taught"
            )
        name, tensor = source.name, source.tensor
        if origin.dtype != tensor.dtype:
            raise LayoutError(f"{name}: the loader reads its bytes as {origin.dtype}")
        if target.dtype != tensor.dtype:
            raise LayoutError(
                f"{name}: {tensor.dtype} in the checkpoint but {target.dtype} in the engine; "
                "adopt the model in the engine's type"
            )
        if target.shape != origin.shape:
            raise LayoutError(
                f"{name}: shape {tuple(origin.shape)} is broadcast to {tuple(target.shape)}"
            )
        start, size, strides = _box_of(source, origin, target)
        offset = span.block_offset_bytes + target.data_ptr() - span.address
        self._pieces.setdefault(name, []).append(_Piece(start, size, span.block, offset, strides))

    def _span_of(self, tensor: torch.Tensor) -> Span | None:
        if tensor.numel() == 0 or tensor.device.type == "meta":
            return None
        address = tensor.data_ptr()
        low, high = 0, len(self._spans)
        while low < high:
            middle = (low + high) // 2
            if self._spans[middle].address <= address:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return None
        span = self._spans[low - 1]
        return span if address < span.address + span.size_bytes else None

    def _source_of(self, tensor: torch.Tensor) -> _Source | None:
        address = tensor.data_ptr()
        for source in reversed(self._live):
            begin = source.tensor.data_ptr()
            if begin <= address < begin + source.tensor.numel() * source.tensor.element_size():
                return source
        return None

    def _latest(self) -> str:
        return self._live[-1].name if self._live else "(before the first tensor)"

    def views(self) -> tuple[tuple[TensorView, ...], int]:
        """All checkpoint tensors as views, and the size in bytes of the filled padding.

        Raises LayoutError for a tensor that was never copied, and for an engine parameter with
        elements that neither a checkpoint tensor nor a fill explains.
        """
        views = []
        for name, (shape, dtype) in self._shapes.items():
            pieces = self._pieces.get(name)
            if not pieces:
                raise LayoutError(
                    f"{name}: is in the checkpoint but the engine never copied it; "
                    "a tensor that is not served cannot be taught"
                )
            views.append(_merge(name, shape, dtype_name(dtype, name), pieces))
        return tuple(views), self._padding(views)

    def _padding(self, views: list[TensorView]) -> int:
        covered = dict.fromkeys((span.name for span in self._spans), 0)
        total = 0
        by_place = sorted(
            ((span.block, span.block_offset_bytes, span) for span in self._spans),
            key=lambda item: item[:2],
        )
        position = 0
        for view in sorted(views, key=lambda view: (view.block, view.offset_bytes)):
            while position + 1 < len(by_place) and by_place[position + 1][:2] <= (
                view.block,
                view.offset_bytes,
            ):
                position += 1
            covered[by_place[position][2].name] += view.size_bytes
        for span in self._spans:
            missing = span.size_bytes - covered[span.name]
            if missing < 0:
                raise LayoutError(f"{span.name}: a tensor lies in it and in the next parameter")
            if missing > self._filled.get(span.name, 0):
                raise LayoutError(
                    f"{span.name}: {missing} of its {span.size_bytes} bytes in the engine come "
                    "from no checkpoint tensor; the model is incomplete or of another version"
                )
            total += missing
        return total


def _box_of(
    source: _Source, origin: torch.Tensor, target: torch.Tensor
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int | None, ...]]:
    """Which box of the source `origin` is, and the target's stride along each of its axes."""
    name, whole = source.name, source.tensor
    if not whole.is_contiguous():
        raise LayoutError(f"{name}: the checkpoint reader gave a tensor that is not contiguous")
    flat = (origin.data_ptr() - whole.data_ptr()) // whole.element_size()
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


def _merge(name: str, shape: tuple[int, ...], dtype: str, pieces: list[_Piece]) -> TensorView:
    """One view of all pieces, which must tile the tensor without gap or overlap."""
    itemsize = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    if len({piece.block for piece in pieces}) > 1:
        raise LayoutError(f"{name}: lies in several blocks of memory")
    if sum(prod(piece.size) for piece in pieces) != prod(shape) or _boxes_overlap(pieces):
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


def _offset(piece: _Piece, stride: list[int], itemsize: int) -> int:
    return sum(at * step for at, step in zip(piece.start, stride, strict=True)) * itemsize


def _stride_along(
    name: str, axis: int, shape: tuple[int, ...], pieces: list[_Piece], itemsize: int
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


def _boxes_overlap(pieces: list[_Piece]) -> bool:
    def meet(one: _Piece, other: _Piece) -> bool:
        return all(
            a < b + m and b < a + n
            for a, n, b, m in zip(one.start, one.size, other.start, other.size, strict=True)
        )

    return any(meet(one, other) for at, one in enumerate(pieces) for other in pieces[at + 1 :])
