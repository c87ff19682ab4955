"""One file of the journal: how one generation's weights differ from another's, chunk by chunk.

    "RVJSEG1\\n"
    deltas, one after the other                          see `codec`
    index: chunk u32 | offset u64 | length u32 | hash before 32 bytes, for every chunk with a delta
    table: hash after, 32 bytes, for every chunk of the model
    facts: JSON, what the generation is
    tail:  offsets of index, table, facts u64 each | BLAKE3 of all that is before this hash

All numbers are little-endian. A base has no deltas: its table says what a complete model directory
of that generation holds. A file is written once and never changed.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from blake3 import blake3

from apollo.journal.disk import Disk
from apollo.journal.image import HASH_BYTES

MAGIC: Final = b"RVJSEG1\n"
PIECE_BYTES: Final = 16 << 20
_ENTRY: Final = struct.Struct("<IQI32s")
_TAIL: Final = struct.Struct("<QQQ32s")


class SegmentDamaged(ValueError):
    """The file is not what was written."""


@dataclass(frozen=True)
class Delta:
    """Where one chunk's delta lies."""

    offset: int
    length: int
    before: bytes
    """Hash of the chunk that it leads from."""


@dataclass(frozen=True)
class Segment:
    """A segment's index and table; its deltas stay on disk until they are asked for."""

    path: str
    deltas: Mapping[int, Delta]
    table: bytes
    facts: Mapping[str, Any]

    def hash_after(self, chunk: int) -> bytes:
        return self.table[chunk * HASH_BYTES : (chunk + 1) * HASH_BYTES]

    def follows(self, parent: "Segment") -> bool:
        """Whether each delta leads from what `parent` holds, and all other chunks are as there."""
        return all(
            parent.hash_after(at)
            == (self.deltas[at].before if at in self.deltas else self.hash_after(at))
            for at in range(len(self.table) // HASH_BYTES)
        )

    def delta(self, disk: Disk, chunk: int) -> bytes | None:
        """The delta of a chunk, None if it did not change."""
        place = self.deltas.get(chunk)
        return None if place is None else disk.read(self.path, place.offset, place.length)

    @classmethod
    def read(cls, disk: Disk, path: str) -> Self:
        """Read index, table and facts; raises SegmentDamaged if they cannot be read.

        Does not look at the deltas: see `check`.
        """
        try:
            size = disk.size(path)
            if size < len(MAGIC) + _TAIL.size or disk.read(path, 0, len(MAGIC)) != MAGIC:
                raise SegmentDamaged(f"{_name(path)} is not a segment")
            index_at, table_at, facts_at, _ = _TAIL.unpack(disk.read(path, size - _TAIL.size))
            if not len(MAGIC) <= index_at <= table_at <= facts_at <= size - _TAIL.size:
                raise SegmentDamaged(f"{_name(path)}: its parts are out of order")
            rest = disk.read(path, index_at, size - _TAIL.size - index_at)
        except FileNotFoundError:
            raise SegmentDamaged(f"{_name(path)} is missing") from None
        index, table = rest[: table_at - index_at], rest[table_at - index_at : facts_at - index_at]
        if len(index) % _ENTRY.size or len(table) % HASH_BYTES:
            raise SegmentDamaged(f"{_name(path)}: its index or table is cut")
        deltas = {
            chunk: Delta(offset, length, before)
            for chunk, offset, length, before in _ENTRY.iter_unpack(index)
        }
        try:
            facts = json.loads(rest[facts_at - index_at :])
        except ValueError:
            raise SegmentDamaged(f"{_name(path)}: its facts are not JSON") from None
        return cls(path, deltas, table, facts)


class SegmentWriter:
    """Writes a new segment front to back. Not durable before the caller has synced `directory`."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._path = path
        self._hash = blake3()
        self._size = 0
        self._index: list[bytes] = []
        disk.create(path)
        self._append(MAGIC)

    def add(self, chunk: int, before: bytes, delta: bytes) -> None:
        """Append the delta of one chunk, whose hash was `before`."""
        self._index.append(_ENTRY.pack(chunk, self._size, len(delta), before))
        self._append(delta)

    def finish(self, table: bytes, facts: Mapping[str, Any]) -> tuple[int, str]:
        """Append the rest and sync the file; returns its size and its hash."""
        offsets = []
        for part in (b"".join(self._index), table, json.dumps(facts).encode()):
            offsets.append(self._size)
            self._append(part)
        self._append(_TAIL.pack(*offsets, bytes(HASH_BYTES))[:-HASH_BYTES])
        seal = self._hash.digest()
        self._append(seal)
        self._disk.sync(self._path)
        return self._size, seal.hex()

    def _append(self, data: bytes) -> None:
        self._disk.write(self._path, self._size, data)
        self._hash.update(data)
        self._size += len(data)


def check(disk: Disk, path: str, size: int, seal: str) -> None:
    """Read the whole file; raises SegmentDamaged unless it is the one of that size and hash."""
    try:
        hashed, at = blake3(), 0
        while at < size - HASH_BYTES:
            piece = disk.read(path, at, min(PIECE_BYTES, size - HASH_BYTES - at))
            hashed.update(piece)
            at += len(piece)
            if not piece:
                raise SegmentDamaged(f"{_name(path)} became shorter while it was read")
        if not _is_sealed(hashed.hexdigest(), disk.read(path, at).hex(), seal):
            raise SegmentDamaged(f"{_name(path)} does not have the hash that it was written with")
    except FileNotFoundError:
        raise SegmentDamaged(f"{_name(path)} is missing") from None


def _is_sealed(computed: str, stored: str, expected: str) -> bool:
    return computed == stored == expected


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]
