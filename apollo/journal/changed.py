"""The words of one tensor that have changed since the newest generation: nothing else was moved.

octets_io (bit b of octet o: column 8o+b) + the changed words in row-major order
    --between--> of any stretch of the tensor's words: which have changed, and what to
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from apollo.journal.codec import Words


@dataclass(frozen=True)
class ChangedWords:
    """A tensor of rows x columns of which all other words are as they were."""

    octets_io: NDArray[np.uint8]
    """Not looked at where there are no words."""
    columns: int
    words: Words

    @cached_property
    def _before(self) -> NDArray[np.int64]:
        """Number of changed words in the rows before each row."""
        counts = np.bitwise_count(self.octets_io).sum(1, dtype=np.int64)
        return np.concatenate(([0], np.cumsum(counts)))

    def between(self, first: int, num: int) -> tuple[NDArray[np.intp], Words]:
        """Of `num` words from `first` on: positions among them, ascending, and their new words."""
        if not len(self.words):
            return np.zeros(0, np.intp), self.words
        row, last = first // self.columns, -(-(first + num) // self.columns)
        if self._before[last] == self._before[row]:
            return np.zeros(0, np.intp), self.words[:0]
        octets = self.octets_io[row:last]
        flags = np.unpackbits(octets, axis=1, count=self.columns, bitorder="little").reshape(-1)
        start = first - row * self.columns
        where = np.flatnonzero(flags[start : start + num])
        at = int(self._before[row]) + int(np.count_nonzero(flags[:start]))
        return where, self.words[at : at + len(where)]
