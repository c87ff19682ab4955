"""Finds a `WeightLayout` by watching a model's own loader copy a checkpoint into its parameters.

vLLM fuses, shards and pads tensors differently per architecture and version; its loader is the only
description of that which is always right. So nothing is assumed: every `copy_` into the weights is
recorded, traced back to the checkpoint tensor it read, and merged into one strided view.

    checkpoint iterator --(name, tensor)--> model.load_weights --aten.copy_--> weight memory
              |                                                      |
              +-- source intervals (data_ptr) ----- Recorder --------+--> pieces -> TensorView

Whatever does not trace back (a transformed, repacked or computed tensor) is an error with its name.
Tensors on the meta device are recorded like any others, so a map needs no memory.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apollo.weights.layout import LayoutError, TensorView, dtype_name
from apollo.weights.pieces import Piece, address_of, box_of, merge, merge_parts

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


class Recorder(TorchDispatchMode):
    """Watches writes into `spans` while a loader runs; `views` then gives the map.

    Use `watch` around the checkpoint iterator, and the recorder itself as a context manager around
    the loader. Raises LayoutError as soon as a write cannot be explained. A tensor that the loader
    copies only in part is an error, unless this process `is_rank`: one of several, each of which
    holds parts of tensors.
    """

    def __init__(self, spans: Iterable[Span], *, is_rank: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_rank = is_rank
        self._spans = sorted(spans, key=lambda span: span.address)
        self._live: deque[_Source] = deque(maxlen=MAX_LIVE_SOURCES)
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._pieces: dict[str, list[Piece]] = {}
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
        start, size, strides = box_of(name, tensor, origin, target)
        offset = span.block_offset_bytes + address_of(target) - span.address
        self._pieces.setdefault(name, []).append(Piece(start, size, span.block, offset, strides))

    def _span_of(self, tensor: torch.Tensor) -> Span | None:
        if tensor.numel() == 0:
            return None
        address = address_of(tensor)
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
        address = address_of(tensor)
        for source in reversed(self._live):
            begin = address_of(source.tensor)
            if begin <= address < begin + source.tensor.nbytes:
                return source
        return None

    def _latest(self) -> str:
        return self._live[-1].name if self._live else "(before the first tensor)"

    def views(self) -> tuple[tuple[TensorView, ...], int]:
        """All checkpoint tensors as views, and the size in bytes of the filled padding.

        Raises LayoutError for a tensor that was never copied, and for an engine parameter with
        elements that neither a checkpoint tensor nor a fill explains.
        """
        views: list[TensorView] = []
        for name, (shape, dtype) in self._shapes.items():
            pieces = self._pieces.get(name)
            if not pieces:
                raise LayoutError(
                    f"{name}: is in the checkpoint but the engine never copied it; "
                    "a tensor that is not served cannot be taught"
                )
            known = dtype_name(dtype, name)
            if self._is_rank:
                views += merge_parts(name, shape, known, pieces)
            else:
                views.append(merge(name, shape, known, pieces))
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
