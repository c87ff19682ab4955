"""Where the trainer notes what it has changed, in memory that whoever commits can read and clear.

    trainer: create --file, or IPC handle--> open: checkpoint actor
             steps set bits                        under a hold: take them, and clear them

Owns that memory and its file format; what a bit means is `apollo.optim.changes`'s.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from apollo.optim.changes import map_shape
from apollo.weights.layout import Block, LayoutError
from apollo.weights.memory import ALIGNMENT, make_block, open_block

FORMAT: Final = 1


@dataclass(frozen=True)
class ChangeMaps:
    """A map for each tensor that is learned as one parameter; by checkpoint name."""

    generation: int
    """The weights from which on changes are noted."""
    frozen: frozenset[str]
    """Tensors that are never written, and need no map."""
    maps: Mapping[str, Tensor]
    """uint8 changed_io; a tensor that is neither here nor frozen may have changed anywhere."""

    @classmethod
    def create(
        cls,
        path: Path,
        shapes: Mapping[str, tuple[int, int]],
        frozen: frozenset[str],
        device: torch.device,
        generation: int,
    ) -> Self:
        """Make maps, with no bit set, for matrices of rows x columns; `open` finds them by `path`.

        What an earlier trainer has left there is replaced.
        """
        path.unlink(missing_ok=True)
        octets = {name: map_shape(*shape) for name, shape in shapes.items()}
        memory, block = make_block(_size_bytes(octets), path, device)
        described = {
            "format": FORMAT,
            "generation": generation,
            "frozen": sorted(frozen),
            "device": device.type,
            "block": asdict(block),
            "octets": octets,
        }
        partial = _description(path).with_suffix(".partial")
        partial.write_text(json.dumps(described))
        partial.rename(_description(path))
        return cls(generation, frozen, _cut(memory, octets))

    @classmethod
    def open(cls, path: Path) -> Self:
        """The same memory in another process; raises LayoutError on an unknown format."""
        data: dict[str, Any] = json.loads(_description(path).read_text())
        if data.get("format") != FORMAT:
            raise LayoutError(f"{path.name}: format {data.get('format')!r}, expected {FORMAT}")
        memory = open_block(Block(**data["block"]), data["device"], is_writable=True)
        octets = {name: (rows, across) for name, (rows, across) in data["octets"].items()}
        return cls(data["generation"], frozenset(data["frozen"]), _cut(memory, octets))

    def clear(self) -> None:
        """Forget all changes; the caller keeps the trainer still."""
        for changed_io in self.maps.values():
            changed_io.zero_()


def _description(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _aligned(octets: tuple[int, int]) -> int:
    return -(-prod(octets) // ALIGNMENT) * ALIGNMENT


def _size_bytes(octets: Mapping[str, tuple[int, int]]) -> int:
    return max(ALIGNMENT, sum(map(_aligned, octets.values())))


def _cut(memory: Tensor, octets: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    maps, begin = {}, 0
    for name, shape in octets.items():
        maps[name] = memory[begin : begin + prod(shape)].view(shape)
        begin += _aligned(shape)
    return maps
