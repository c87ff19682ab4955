"""What the weights were in any generation: a complete directory, and the deltas from there.

    slot at generation 5 --> words --+ delta 6 + delta 7--> words of 7 --check the hash--> answer
                              (or back: - delta 5 - delta 4, words of 3)

A chunk that does not come out with the hash that its generation says is not used, whatever was
damaged on the way; the other slot is tried. So one good copy of each chunk, in whichever slot,
gives every generation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from apollo.journal import codec
from apollo.journal.chain import Chain
from apollo.journal.codec import CorruptDelta, Words
from apollo.journal.disk import Disk, DiskFailed
from apollo.journal.image import Image, ImageError, digest
from apollo.journal.segment import Segment, SegmentDamaged

_UNREADABLE: Final = (FileNotFoundError, ImageError, DiskFailed)
"""A bad sector of one slot is no reason not to read the other one."""


class WeightsDamaged(Exception):
    """No copy of a chunk is what its hash says; the message names the tensor."""


@dataclass(frozen=True)
class Slot:
    """A complete model directory, and which generation it says it holds."""

    directory: str
    generation: int


class Values:
    """Reads chunks of any generation of a chain. Keeps the tables in memory, never the weights."""

    def __init__(self, disk: Disk, folder: str, chain: Chain, image: Image) -> None:
        self._disk = disk
        self._image = image
        self._at = {each.generation: at for at, each in enumerate(chain.generations)}
        self._paths = [f"{folder}/{each.segment.name}" for each in chain.generations]
        self._segments: dict[int, Segment] = {}

    def segment(self, generation: int) -> Segment:
        """Index and table of a generation; raises SegmentDamaged."""
        at = self._at[generation]
        if at not in self._segments:
            self._segments[at] = Segment.read(self._disk, self._paths[at])
        return self._segments[at]

    def table(self, generation: int) -> bytes:
        """Hashes of all chunks of a generation."""
        return self.segment(generation).table

    def read(self, chunk: int, generation: int, slots: Iterable[Slot]) -> Words:
        """The chunk's words in `generation`, from the first slot that can be believed.

        Raises WeightsDamaged if none can.
        """
        place = self._image.chunks[chunk]
        expected = self.segment(generation).hash_after(chunk)
        reason = ""
        for slot in slots:
            if slot.generation not in self._at:
                continue
            try:
                words = self._image.read(self._disk, slot.directory, place)
                words = self._moved(words, chunk, slot.generation, generation)
            except (*_UNREADABLE, CorruptDelta, SegmentDamaged) as error:
                if isinstance(error, DiskFailed):
                    reason = f" ({error})"
                continue
            if _has_hash(words, expected):
                return words
        raise WeightsDamaged(
            f"{place.tensor}: no copy of its words {place.first_word} to "
            f"{place.first_word + place.num_words - 1} in generation {generation} is undamaged"
            f"{reason}; restore from a mirror"
        )

    def can_read(self, generation: int, slots: Iterable[Slot], threads: int = 1) -> bool:
        """Whether every chunk of `generation` can be had from these slots: their chunks are whole.

        Reads and hashes all weights of the first slot.
        """
        for slot in slots:
            if slot.generation not in self._at:
                return False
            try:
                table = self._image.table(self._disk, slot.directory, threads)
            except _UNREADABLE:
                return False
            return table == self.table(slot.generation)
        return False

    def _moved(self, words: Words, chunk: int, start: int, goal: int) -> Words:
        for at in self._path(start, goal):
            segment = self.segment(at)
            delta = segment.delta(self._disk, chunk)
            if delta is not None:
                words = codec.apply(words, delta, is_backward=goal < start)
        return words

    def _path(self, start: int, goal: int) -> Sequence[int]:
        """Generations whose deltas lead from `start` to `goal`, in the order of the way."""
        order = list(self._at)
        first, last = self._at[start], self._at[goal]
        if first <= last:
            return order[first + 1 : last + 1]
        return order[last + 1 : first + 1][::-1]


def _has_hash(words: Words, expected: bytes) -> bool:
    return digest(words) == expected
