"""A delta between two states of one chunk of weights, as bytes; exact for every bit pattern.

    old, new (n unsigned words: the bits of n floats)
      -> ordered: integers in the order of the floats they spell, so neighbours differ by 1
      -> steps: ordered(new) - ordered(old), in units of the last place, modulo 2**bits
      -> few changed:  gaps between the changed positions, signs, magnitudes - 1
         most changed: zigzag of all steps
      -> split into byte planes, each a zstd frame

A delta is added to go forward and subtracted to go back; neither can fail, and both are exact. So
deltas add up to one without the weights, see `compose`. The order and the hashes of chunks are the
segment's business.

    record = mode u8 | bytes of a word u8 | count u32 | (stored bytes u32 | plane) ...
             mode 0: 3 planes of gaps, the signs, one plane per byte of a magnitude
             mode 1: one plane per byte of a zigzag step
    plane  = empty: all zero | 0x00 raw bytes | 0x01 a zstd frame
"""

import struct
import sys
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_WORDS: Final = 1 << 22
"""Words of a chunk at most; a gap then fits into three bytes."""
DENSE_SHARE: Final = 0.5
"""Share of changed words above which every word's step is written."""
ZSTD_LEVEL: Final = 1
_GAP_PLANES: Final = 3
_HEADER: Final = struct.Struct("<BBI")
_LENGTH: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size
_SPARSE, _DENSE = 0, 1
_RAW, _ZSTD = b"\x00", b"\x01"

Words = NDArray[np.unsignedinteger]
_SIGNED: Final = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}


class CorruptDelta(ValueError):
    """The bytes are not a delta of such a chunk; nothing was changed."""


def encode(old: Words, new: Words) -> bytes:
    """The delta that turns `old` into `new`: words of 2 or 4 bytes, equal in number and type."""
    assert old.dtype == new.dtype and old.shape == new.shape and 0 < old.size <= MAX_WORDS
    changed = np.flatnonzero(old != new)
    if len(changed) > DENSE_SHARE * len(old):
        return _dense(_ordered(new) - _ordered(old))
    return _sparse(changed, _ordered(new[changed]) - _ordered(old[changed]))


def compose(deltas: Iterable[bytes], num_words: int, word_bytes: int) -> bytes:
    """The one delta that does what all of these do, one after the other, to so many words.

    Needs no weights: steps add up modulo 2**bits. Raises CorruptDelta.
    """
    steps = np.zeros(num_words, f"u{word_bytes}")
    for delta in deltas:
        where, some = _steps(delta, num_words, steps.dtype)
        steps[where] += some
    changed = np.flatnonzero(steps)
    if len(changed) > DENSE_SHARE * num_words:
        return _dense(steps)
    return _sparse(changed, steps[changed])


def apply(old: Words, delta: bytes, *, is_backward: bool = False) -> Words:
    """`old` moved by `delta`, or, backward, the words from which `delta` leads to `old`.

    Raises CorruptDelta. Takes memory in proportion to `old`, whatever the bytes say.
    """
    where, steps = _steps(delta, len(old), old.dtype)
    moved = _unordered(_moved(_ordered(old[where]), steps, is_backward))
    if isinstance(where, slice):
        return moved
    new = old.copy()
    new[where] = moved
    return new


def num_changed(delta: bytes) -> int:
    """Words that a delta writes down, from its first bytes: all of a chunk that mostly changed.

    Raises CorruptDelta.
    """
    return _Reader(delta).header()[2]


def _dense(steps: Words) -> bytes:
    """The record of every word's step."""
    planes = _planes(_zigzag(steps), steps.itemsize)
    return _pack(_DENSE, steps.itemsize, len(steps), planes)


def _sparse(changed: NDArray[np.intp], steps: Words) -> bytes:
    """The record of the steps, none of them zero, of the words at the positions `changed`."""
    is_down = steps.view(_SIGNED[steps.dtype]) < 0
    magnitudes = np.where(is_down, -steps, steps) - steps.dtype.type(1)
    gaps = np.diff(changed, prepend=-1).astype(np.uint32) - np.uint32(1)
    planes = [
        *_planes(gaps, _GAP_PLANES),
        np.packbits(is_down).tobytes(),
        *_planes(magnitudes, steps.itemsize),
    ]
    return _pack(_SPARSE, steps.itemsize, len(changed), planes)


def _steps(
    delta: bytes, num_words: int, dtype: np.dtype[Any]
) -> tuple[NDArray[np.int64] | slice, Words]:
    """Which of so many words a delta moves, no word twice, and each one's step."""
    reader = _Reader(delta)
    mode, itemsize, count = reader.header()
    if itemsize != dtype.itemsize or count > num_words:
        raise CorruptDelta(f"{count} words of {itemsize} bytes do not fit {num_words} {dtype}")
    if mode == _DENSE and count == num_words:
        steps = _unzigzag(_joined(reader.planes(itemsize, count), dtype))
        reader.end()
        return slice(None), steps
    if mode != _SPARSE:
        raise CorruptDelta(f"a delta of mode {mode} with {count} steps for {num_words} words")
    gaps = _joined(reader.planes(_GAP_PLANES, count), np.dtype(np.uint32))
    is_down = np.unpackbits(reader.plane(-(-count // 8)), count=count).astype(bool)
    steps = _joined(reader.planes(itemsize, count), dtype) + dtype.type(1)
    reader.end()
    positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if count and positions[-1] >= num_words:
        raise CorruptDelta(f"position {positions[-1]} of {num_words} words")
    return positions, np.where(is_down, -steps, steps)


def _ordered(words: Words) -> Words:
    """Floats are sign and magnitude: flip what is negative, and the integers are in order."""
    bits = words.dtype.itemsize * 8
    is_negative = words >> words.dtype.type(bits - 1)
    mask = (-is_negative) >> words.dtype.type(1)  # All but the sign, where it is set.
    return words ^ mask


_unordered = _ordered  # The sign stays, so that the same flips lead back.


def _moved(words: Words, steps: Words, is_backward: bool) -> Words:
    return words - steps if is_backward else words + steps


def _zigzag(steps: Words) -> Words:
    """0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ...: small steps of both signs have high bytes of 0."""
    signs = (steps.view(_SIGNED[steps.dtype]) >> (steps.itemsize * 8 - 1)).view(steps.dtype)
    return (steps << steps.dtype.type(1)) ^ signs


def _unzigzag(words: Words) -> Words:
    return (words >> words.dtype.type(1)) ^ -(words & words.dtype.type(1))


def _planes(words: Words, num_planes: int) -> list[bytes]:
    """The lowest bytes of all words, then the second lowest, ...: little-endian, split."""
    # Shifts go through the words in order: three times as fast as every fourth byte of a view.
    kind = words.dtype.type
    return [(words >> kind(8 * at)).astype(np.uint8).tobytes() for at in range(num_planes)]


def _joined(planes: Iterable[NDArray[np.uint8]], dtype: np.dtype[np.unsignedinteger]) -> Words:
    words: Words | None = None
    for at, plane in enumerate(planes):
        shifted = plane.astype(dtype) << dtype.type(8 * at)
        words = shifted if words is None else words | shifted
    assert words is not None
    return words


def _pack(mode: int, itemsize: int, count: int, planes: Iterable[bytes]) -> bytes:
    parts = [_HEADER.pack(mode, itemsize, count)]
    for plane in planes:
        stored = _stored(plane)
        parts += [_LENGTH.pack(len(stored)), stored]
    return b"".join(parts)


def _stored(plane: bytes) -> bytes:
    if not any(plane[:1]) and not np.frombuffer(plane, np.uint8).any():
        return b""
    frame = zstd.compress(plane, ZSTD_LEVEL)
    return _ZSTD + frame if len(frame) < len(plane) else _RAW + plane


class _Reader:
    """Reads a record's parts in order; every length is checked before anything is unpacked."""

    def __init__(self, record: bytes) -> None:
        self._record = record
        self._at = 0

    def header(self) -> tuple[int, int, int]:
        mode, itemsize, count = _HEADER.unpack(self._take(_HEADER.size))
        return mode, itemsize, count

    def planes(self, num_planes: int, size: int) -> list[NDArray[np.uint8]]:
        return [self.plane(size) for _ in range(num_planes)]

    def plane(self, size: int) -> NDArray[np.uint8]:
        stored = self._take(_LENGTH.unpack(self._take(_LENGTH.size))[0])
        if not stored:
            return np.zeros(size, np.uint8)
        kind, data = stored[:1], stored[1:]
        if kind == _ZSTD:
            data = _decompressed(data, size)
        elif kind != _RAW:
            raise CorruptDelta(f"a plane of kind {kind!r}")
        if len(data) != size:
            raise CorruptDelta(f"a plane of {len(data)} bytes instead of {size}")
        return np.frombuffer(data, np.uint8)

    def end(self) -> None:
        if self._at != len(self._record):
            raise CorruptDelta(f"{len(self._record) - self._at} bytes follow the last plane")

    def _take(self, size: int) -> bytes:
        taken = self._record[self._at : self._at + size]
        if len(taken) != size:
            raise CorruptDelta(f"it ends after {len(self._record)} bytes")
        self._at += size
        return taken


def _decompressed(frame: bytes, size: int) -> bytes:
    """At most `size` + 1 bytes, so that a forged frame cannot fill the memory."""
    try:
        return zstd.ZstdDecompressor().decompress(frame, max_length=size + 1)
    except zstd.ZstdError as error:
        raise CorruptDelta(f"zstd: {error}") from None
