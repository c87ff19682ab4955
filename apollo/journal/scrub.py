"""Reads all that a journal keeps, and says what is damaged and what is lost by it.

    every file of the chain, whole --hash--> damaged files
    every chunk: each directory's copy --hash--> damaged copies
                 a good copy, through all generations, back and forth --hashes--> lost ones

Only reads; what the disk itself cannot read counts as damaged. A damaged delta or copy loses
generations only if no other way leads to them, so the two are told apart. A hidden directory may
be called damaged when a publication into it was interrupted; the next one writes it anew.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from apollo.journal import chain as chains
from apollo.journal import codec
from apollo.journal.chain import Chain, ChainError, Generation, StoredFile
from apollo.journal.codec import CorruptDelta, Words
from apollo.journal.disk import DiskError
from apollo.journal.image import Chunk, ImageError, digest
from apollo.journal.journal import Journal
from apollo.journal.segment import Segment, SegmentDamaged
from apollo.journal.values import Slot

PIECE_BYTES: Final = 16 << 20
_UNREADABLE: Final = (FileNotFoundError, DiskError, ImageError)


@dataclass(frozen=True)
class DamagedCopy:
    """A chunk of a model directory that is not what its generation's hash says."""

    directory: str
    tensor: str
    first_word: int
    num_words: int


@dataclass(frozen=True)
class Scrub:
    """What a full check has found; all empty if every bit is as it was written."""

    files: tuple[str, ...]
    """Damaged or missing files: manifests, segments, optimizers, and files of the directories."""
    copies: tuple[DamagedCopy, ...]
    """Damaged chunks of the directories; another copy may give them all the same."""
    lost: tuple[int, ...]
    """Generations of which some chunk can be had from nowhere."""
    bytes_read: int

    @property
    def is_clean(self) -> bool:
        return not (self.files or self.copies or self.lost)


def scrub(journal: Journal, progress: Callable[[str], None] = lambda note: None) -> Scrub:
    """Check everything, while nothing is committed or published; reads all files, deltas twice.

    `progress` is told of each segment, and of each chunk of the weights.
    """
    return _Scrubber(journal, progress).run()


class _Scrubber:
    def __init__(self, journal: Journal, progress: Callable[[str], None]) -> None:
        self._journal = journal
        self._disk = journal.disk
        self._progress = progress
        self._generations = journal.chain.generations
        self._files: list[str] = []
        self._copies: list[DamagedCopy] = []
        self._bytes_read = 0
        self._sound: set[int] = set()
        """Places in the chain of the segments whose tables can be believed."""

    def run(self) -> Scrub:
        self._check_manifests()
        segments = [self._segment(at, each) for at, each in enumerate(self._generations)]
        for at, (parent, child) in enumerate(pairwise(segments), start=1):
            if parent is None or child is None or not {at - 1, at} <= self._sound:
                continue
            if not child.follows(parent):
                self._files.append(f"{self._journal.folder}/{self._generations[at].segment.name}")
        stored = {g.optimizer.name: g.optimizer for g in self._generations if g.optimizer}
        for each in stored.values():
            self._check_optimizer(each)
        order = [each.generation for each in self._generations]
        slots = [slot for slot in self._journal.slots.slots() if slot.generation in order]
        for slot in slots:
            self._check_files(slot)
        lost: set[int] = set()
        for at, chunk in enumerate(self._journal.image.chunks):
            place = f"words {chunk.first_word} to {chunk.first_word + chunk.num_words - 1}"
            self._progress(f"{chunk.tensor}, {place}")
            found: set[int] = set()
            for slot in slots:
                start = order.index(slot.generation)
                known = _hash_after(segments[start], at) if start in self._sound else None
                words = self._copy(slot, chunk, known)
                if words is not None and len(found) < len(order):
                    found |= set(self._walk(words, at, start, segments))
            lost |= set(range(len(order))) - found
        numbers = tuple(order[at] for at in sorted(lost))
        return Scrub(tuple(self._files), tuple(self._copies), numbers, self._bytes_read)

    def _check_manifests(self) -> None:
        folder, newest = self._journal.folder, self._journal.chain.sequence
        for sequence in range(newest, newest - chains.KEPT_MANIFESTS, -1):
            path = f"{folder}/{chains.manifest_name(sequence)}"
            try:
                data = self._disk.read(path)
                self._bytes_read += len(data)
                Chain.decode(data)
            except (*_UNREADABLE, ChainError):
                self._files.append(path)

    def _segment(self, at: int, generation: Generation) -> Segment | None:
        """As far as it can be used: a damaged delta does no harm to the other ones."""
        stored = generation.segment
        path = f"{self._journal.folder}/{stored.name}"
        self._progress(f"{stored.name}, {at + 1} of {len(self._generations)}")
        try:
            segment = self._journal.check_segment(generation)
            self._bytes_read += stored.size
            self._sound.add(at)
            return segment
        except (*_UNREADABLE, SegmentDamaged):
            self._files.append(path)
        try:
            return Segment.read(self._disk, path)
        except (*_UNREADABLE, SegmentDamaged):
            return None

    def _check_optimizer(self, stored: StoredFile) -> None:
        path = f"{self._journal.folder}/{stored.name}"
        try:
            data = self._disk.read(path)
            self._bytes_read += len(data)
            if not stored.holds(data):
                self._files.append(path)
        except _UNREADABLE:
            self._files.append(path)

    def _check_files(self, slot: Slot) -> None:
        """Headers of the weights, and that every other file has the size it was written with."""
        image = self._journal.image
        held = self._journal.slots.require(slot.directory)
        for name, size in held.files.items():
            path, header = f"{slot.directory}/{name}", image.headers.get(name, b"")
            try:
                is_whole = self._disk.size(path) == size
                is_whole &= self._disk.read(path, 0, len(header)) == header
            except _UNREADABLE:
                is_whole = False
            if not is_whole:
                self._files.append(path)

    def _copy(self, slot: Slot, chunk: Chunk, known: bytes | None) -> Words | None:
        """The chunk as the directory holds it, noted if it is not what is known of it."""
        words = None
        try:
            words = self._journal.image.read(self._disk, slot.directory, chunk)
            self._bytes_read += chunk.size_bytes
        except _UNREADABLE:
            pass
        if words is None or (known is not None and not _has_hash(digest(words), known)):
            place = (chunk.tensor, chunk.first_word, chunk.num_words)
            self._copies.append(DamagedCopy(slot.directory, *place))
        return words

    def _walk(
        self, first: Words, at: int, start: int, segments: Sequence[Segment | None]
    ) -> Iterator[int]:
        """Places in the chain at which chunk `at` comes out right, on both ways from `start`."""
        forward = [(goal, segments[goal]) for goal in range(start + 1, len(segments))]
        backward = [(goal, segments[goal + 1]) for goal in range(start - 1, -1, -1)]
        first_hash = digest(first)
        if _has_hash(first_hash, _hash_after(segments[start], at)):
            yield start
        for way in (forward, backward):
            words, now = first, first_hash
            for goal, segment in way:
                if segment is None:
                    break
                try:
                    delta = segment.delta(self._disk, at)
                    if delta is not None:
                        self._bytes_read += len(delta)
                        words = codec.apply(words, delta, is_backward=way is backward)
                        now = digest(words)
                except (*_UNREADABLE, CorruptDelta):
                    break
                if _has_hash(now, _hash_after(segments[goal], at)):
                    yield goal


def _hash_after(segment: Segment | None, at: int) -> bytes | None:
    return None if segment is None else segment.hash_after(at)


def _has_hash(found: bytes, expected: bytes | None) -> bool:
    return found == expected
