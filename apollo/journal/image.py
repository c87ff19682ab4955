"""The weights of one model directory as chunks of words, read through the one door to the disk.

    directory --headers of its safetensors files--> tensors --cut--> chunks --BLAKE3--> table

A chunk is at most so many words of one tensor; its number is its place in the order of files, then
of tensors' names. Two directories of one model have the same chunks. A table is the chunks' hashes,
one after the other, 32 bytes each, and its own hash is the root that names these weights.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Self

import numpy as np
from blake3 import blake3

from apollo.journal.ahead import ahead
from apollo.journal.codec import MAX_WORDS, Words
from apollo.journal.disk import Disk

HASH_BYTES: Final = 32
WORD_BYTES: Final = {"F32": 4, "BF16": 2, "F16": 2}
"""Types of safetensors that can be learned in place, and the bytes of one value."""
MAX_HEADER_BYTES: Final = 100_000_000
_WORDS: Final[dict[int, np.dtype[Any]]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


class ImageError(ValueError):
    """A weights file is not what a journal can keep; the message names it."""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive words of one tensor."""

    tensor: str
    first_word: int
    num_words: int
    word_bytes: int
    file: str
    offset: int
    """Of its first byte in the file."""

    @property
    def size_bytes(self) -> int:
        return self.num_words * self.word_bytes

    def words(self, data: bytes) -> Words:
        """Its bytes as little-endian unsigned words."""
        words: Words = np.frombuffer(data, _WORDS[self.word_bytes])
        return words


@dataclass(frozen=True)
class Image:
    """Which chunks the weights of a model have, and where in its files they lie."""

    chunks: tuple[Chunk, ...]
    headers: dict[str, bytes]
    """What comes before the tensors in each weights file; the same in every generation."""
    sizes: dict[str, int]
    """Bytes of each weights file."""

    @classmethod
    def of(cls, disk: Disk, directory: str, chunk_words: int = MAX_WORDS) -> Self:
        """Read the headers. Raises ImageError, or FileNotFoundError without weights."""
        names = [name for name in disk.names(directory) if name.endswith(".safetensors")]
        if not names:
            raise FileNotFoundError(f"{directory} holds no safetensors file")
        chunks: list[Chunk] = []
        headers, sizes = {}, {}
        for name in names:
            path = f"{directory}/{name}"
            sizes[name] = disk.size(path)
            headers[name] = _header(disk, path, name)
            chunks += _chunks(name, headers[name], sizes[name], chunk_words)
        return cls(tuple(chunks), headers, sizes)

    @property
    def headers_hash(self) -> str:
        """Of all headers, in the order of the files: equal in all generations of a model."""
        return digest(b"".join(self.headers[name] for name in sorted(self.headers))).hex()

    def read(self, disk: Disk, directory: str, chunk: Chunk) -> Words:
        """The chunk's words as `directory` holds them; raises ImageError if the file is short."""
        data = disk.read(f"{directory}/{chunk.file}", chunk.offset, chunk.size_bytes)
        if len(data) != chunk.size_bytes:
            raise ImageError(f"{chunk.file} ends within {chunk.tensor}")
        return chunk.words(data)

    def table(self, disk: Disk, directory: str, threads: int = 1) -> bytes:
        """The hashes of all chunks as `directory` holds them."""

        def hash_of(chunk: Chunk) -> bytes:
            return digest(self.read(disk, directory, chunk))

        return b"".join(ahead(hash_of, self.chunks, threads))


def digest(data: Words | bytes | memoryview) -> bytes:
    """BLAKE3 of contiguous bytes or words, 32 bytes."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return blake3(view.cast("B")).digest()


def root(table: bytes) -> str:
    """The name of the weights that have these hashes, in hexadecimal."""
    return blake3(table).hexdigest()


def _header(disk: Disk, path: str, name: str) -> bytes:
    length = int.from_bytes(disk.read(path, 0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise ImageError(f"{name} is not a safetensors file")
    header = disk.read(path, 0, 8 + length)
    if len(header) != 8 + length:
        raise ImageError(f"{name} ends within its header")
    return header


def _chunks(name: str, header: bytes, size: int, chunk_words: int) -> Iterator[Chunk]:
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        places = [
            (
                tensor,
                entry["dtype"],
                prod(map(int, entry["shape"])),
                *map(int, entry["data_offsets"]),
            )
            for tensor, entry in sorted(entries.items())
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ImageError(f"{name} is not a safetensors file") from None
    for tensor, dtype, num_words, begin, end in places:
        word_bytes = WORD_BYTES.get(dtype)
        if word_bytes is None:
            raise ImageError(f"{tensor} is {dtype}; a journal keeps {', '.join(WORD_BYTES)}")
        if end - begin != num_words * word_bytes or len(header) + end > size:
            raise ImageError(f"{name}: the place of {tensor} is not as its shape says")
        for first in range(0, num_words, chunk_words):
            count = min(chunk_words, num_words - first)
            offset = len(header) + begin + first * word_bytes
            yield Chunk(tensor, first, count, word_bytes, name, offset)
