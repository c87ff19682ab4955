"""`Traffic`: whether anybody is being answered, and how fast, in one page of shared memory.

    page: magic | number inside | last came or went | number of gaps | the newest gaps, in a ring

The ingress writes, the trainer and the dream actor read before each thing they do: what is done
only when nobody needs the machine must find out without a message. A *gap* is what the door waits
for the next piece of a streamed answer: nearly always the time between two tokens.
"""

import mmap
import os
import time
from pathlib import Path
from typing import Final

_MAGIC: Final = b"REVTRAFF"
_ONGOING_AT: Final = 1
_LAST_AT: Final = 2
_NUM_GAPS_AT: Final = 3
_GAPS_AT: Final = 8
NUM_GAPS_KEPT: Final = 256
_SIZE: Final = mmap.PAGESIZE
NS: Final = 1_000_000_000
assert (_GAPS_AT + NUM_GAPS_KEPT) * 8 <= _SIZE


class Traffic:
    """Number of requests inside, and when the last one came or went (CLOCK_MONOTONIC)."""

    def __init__(self, path: str, *, is_writable: bool = False) -> None:
        """Open an existing page; its one writer begins with nobody inside."""
        descriptor = os.open(path, os.O_RDWR if is_writable else os.O_RDONLY)
        try:
            access = mmap.ACCESS_WRITE if is_writable else mmap.ACCESS_READ
            self._page = mmap.mmap(descriptor, _SIZE, access=access)
        finally:
            os.close(descriptor)
        if self._page[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{Path(path).name}: is not a page of traffic")
        self._numbers = memoryview(self._page).cast("Q")
        if is_writable:  # Of a writer that died, nobody is inside any more.
            self._numbers[_ONGOING_AT] = 0

    @classmethod
    def create(cls, path: str) -> "Traffic":
        """Make the page, readable by this user only; nobody has come yet."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _SIZE)
            os.pwrite(descriptor, _MAGIC, 0)
        finally:
            os.close(descriptor)
        return cls(path, is_writable=True)

    def enter(self) -> None:
        """A request has come."""
        self._numbers[_LAST_AT] = time.monotonic_ns()
        self._numbers[_ONGOING_AT] += 1

    def leave(self) -> None:
        """A request has been answered, or has gone."""
        assert self._numbers[_ONGOING_AT] > 0, "more requests left than came"
        self._numbers[_LAST_AT] = time.monotonic_ns()
        self._numbers[_ONGOING_AT] -= 1

    def idle_s(self) -> float:
        """Seconds since the last request went; 0 while one is inside, infinite before the first."""
        if self._numbers[_ONGOING_AT]:
            return 0.0
        last = self._numbers[_LAST_AT]
        return (time.monotonic_ns() - last) / NS if last else float("inf")

    def note_gap(self, gap_ns: int) -> None:
        """The next piece of a streamed answer has come, after so long."""
        number = self._numbers[_NUM_GAPS_AT]
        self._numbers[_GAPS_AT + number % NUM_GAPS_KEPT] = gap_ns
        self._numbers[_NUM_GAPS_AT] = number + 1  # Last: a reader takes what lies before it.

    def num_gaps(self) -> int:
        """How many have been noted in all."""
        return int(self._numbers[_NUM_GAPS_AT])

    def gaps_ms(self, since: int) -> list[float]:
        """Those noted after the first `since`, in milliseconds; of many only the newest."""
        end = self.num_gaps()
        begin = max(since, end - NUM_GAPS_KEPT)
        at = (_GAPS_AT + number % NUM_GAPS_KEPT for number in range(begin, end))
        return [self._numbers[each] / 1e6 for each in at]
