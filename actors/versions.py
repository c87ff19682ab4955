"""`VersionCounter`: the numbers that name the state of the weights, in one page of shared memory.

The trainer writes, everybody reads, nobody waits: each number is one aligned 8-byte store, so a
reader sees the old or the new one. A response can thus report its version without a message.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_MAGIC: Final = b"REVERIE1"
_NUMBER: Final = struct.Struct("=Q")
_VERSION_AT: Final = 8
_EPOCH_AT: Final = 16
_NEWEST_AT: Final = 24
_STEPS_AT: Final = 32
_SIZE: Final = mmap.PAGESIZE


class VersionCounter:
    """`weights_version` (one per optimizer step) and `epoch` (an era of cached prefixes)."""

    def __init__(self, path: str, *, is_writable: bool = False) -> None:
        """Open an existing counter; raises FileNotFoundError before the cell made one."""
        descriptor = os.open(path, os.O_RDWR if is_writable else os.O_RDONLY)
        try:
            access = mmap.ACCESS_WRITE if is_writable else mmap.ACCESS_READ
            self._page = mmap.mmap(descriptor, _SIZE, access=access)
        finally:
            os.close(descriptor)
        if self._page[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{Path(path).name}: is not a version counter")

    @classmethod
    def create(cls, path: str) -> "VersionCounter":
        """Make the page with all numbers 0, readable by this user only."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _SIZE)
            os.pwrite(descriptor, _MAGIC, 0)
        finally:
            os.close(descriptor)
        return cls(path, is_writable=True)

    @property
    def weights_version(self) -> int:
        return self._read(_VERSION_AT)

    @weights_version.setter
    def weights_version(self, value: int) -> None:
        assert value >= self.weights_version, "a version number is never taken back"
        self._write(_NEWEST_AT, value)
        self._write(_VERSION_AT, value)

    @property
    def newest_version(self) -> int:
        """What the weights may be of in part: above `weights_version` while a step writes."""
        return self._read(_NEWEST_AT)

    def begin_writing(self, version: int | None = None) -> None:
        """Say that weights of this version, else of the next, are about to be written."""
        self._write(_NEWEST_AT, self.weights_version + 1 if version is None else version)

    @property
    def half_steps(self) -> int:
        """Goes up where a step begins and where it ends: odd while one is computed."""
        return self._read(_STEPS_AT)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Say that a step is computed meanwhile."""
        self._write(_STEPS_AT, self.half_steps + 1)
        try:
            yield
        finally:
            self._write(_STEPS_AT, self.half_steps + 1)

    def end_broken_step(self) -> None:
        """Say that no step is computed any more: whoever was at one has died."""
        self._write(_STEPS_AT, self.half_steps + self.half_steps % 2)

    @property
    def epoch(self) -> int:
        return self._read(_EPOCH_AT)

    def next_epoch(self) -> None:
        """Retire all cached prefixes: requests from now on share none with those before."""
        self._write(_EPOCH_AT, self.epoch + 1)

    def _read(self, at: int) -> int:
        return int(_NUMBER.unpack_from(self._page, at)[0])

    def _write(self, at: int, value: int) -> None:
        # One aligned 8-byte store: a memoryview item assignment does not go byte by byte.
        memoryview(self._page).cast("Q")[at // _NUMBER.size] = value
