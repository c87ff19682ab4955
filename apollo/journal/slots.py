"""Two complete model directories: the public one, and one that is written while nobody looks.

    hidden: empty -> every weights file, its chunks checked before -> sync, and read back meanwhile,
        checked again -> the other files -> reverie.json -> swapped with the public directory

Files are always written anew, so whoever has opened the old ones reads them to their end. A
directory that somebody holds a lease on is left alone, and another one is written.
"""

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Final

from apollo.journal.ahead import ahead, beside
from apollo.journal.chain import replace_file
from apollo.journal.codec import Words
from apollo.journal.disk import Disk, DiskError, DiskFailed, DiskFull
from apollo.journal.image import HASH_BYTES, Image, digest
from apollo.journal.values import Slot
from apollo.weights import manifest
from apollo.weights.manifest import Manifest, ManifestError

MAX_HIDDEN: Final = 8
"""Directories of one model that may be leased at the same time, the public one aside."""
PIECE_BYTES: Final = 16 << 20


class SlotDamaged(Exception):
    """What was written does not read back; it was not published."""


class Slots:
    """The directories of one model. The only writer of them."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._disk = disk
        self.public = f"models/{name}"
        self._hidden = [f"models/.{name}.next", *(f"models/.{name}.next{i}" for i in range(2, 9))]
        self._old = f"models/.{name}.old"

    def manifest(self, directory: str) -> Manifest | None:
        """What a directory says it holds; None if it says nothing that can be read."""
        path = f"{directory}/{manifest.FILE_NAME}"
        try:
            return manifest.decode(self._disk.read(path), path)
        except (FileNotFoundError, ManifestError, DiskFailed):
            return None

    def require(self, directory: str) -> Manifest:
        """The manifest of a directory that was found to have one.

        Raises DiskFailed, FileNotFoundError or ManifestError where it has it no more.
        """
        path = f"{directory}/{manifest.FILE_NAME}"
        return manifest.decode(self._disk.read(path), path)

    def slots(self) -> list[Slot]:
        """Complete directories, the public one first."""
        found = []
        for directory in (self.public, *self._hidden):
            held = self.manifest(directory)
            if held is not None:
                found.append(Slot(directory, held.generation))
        return found

    def first(self) -> str:
        """The first complete directory; the public one if none can be read, which then says why."""
        found = self.slots()
        return found[0].directory if found else self.public

    def mend(self) -> None:
        """Finish a swap that was cut: between its two renames, or before it was durable."""
        if self._disk.is_directory(self._old):
            if self._disk.is_directory(self.public):
                self._empty(self._old)
                self._disk.remove(self._old)
            else:
                self._disk.rename(self._old, self.public)
        # What is seen may be in memory only, and the next publication empties what was public.
        self._disk.sync("models")

    def can_exchange(self) -> bool:
        """Whether directories can be swapped in one atomic step here; tries it."""
        probes = [f"{self._hidden[0]}.probe1", f"{self._hidden[0]}.probe2"]
        for probe in probes:
            if not self._disk.is_directory(probe):
                self._disk.make_directory(probe)
        try:
            self._disk.exchange(*probes)
            return True
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return False
        finally:
            for probe in probes:
                self._disk.remove(probe)

    def write(
        self,
        image: Image,
        table: bytes,
        read: Callable[[int], Words],
        held: Manifest,
        spared: tuple[str, ...] = (),
        threads: int = 1,
    ) -> str:
        """Write a hidden directory, none of `spared`, with the chunks that `read` gives.

        Returns its path: it is complete and durable. `held` is completed with the files' sizes.
        Raises SlotDamaged if a chunk does not read back as `table` says.
        """
        hidden = self._empty_hidden(spared)
        try:
            self._write(hidden, image, table, read, held, threads)
        except DiskFull:
            self._empty(hidden)  # What is half written would keep the disk full for everybody.
            raise
        return hidden

    def _write(
        self,
        hidden: str,
        image: Image,
        table: bytes,
        read: Callable[[int], Words],
        held: Manifest,
        threads: int,
    ) -> None:
        for name, header in image.headers.items():
            path = f"{hidden}/{name}"
            self._disk.create(path, image.sizes[name])
            self._disk.write(path, 0, header)
            ours = [at for at, chunk in enumerate(image.chunks) if chunk.file == name]
            for at, words in zip(ours, ahead(read, ours, threads), strict=True):
                self._disk.write(path, image.chunks[at].offset, words.data.cast("B"))
            self._settle(hidden, name, image, ours, table, threads)
        source = self.first()
        for name in self._other_files(source, image):
            self._copy(f"{source}/{name}", f"{hidden}/{name}")
        sizes = {name: self._disk.size(f"{hidden}/{name}") for name in self._disk.names(hidden)}
        whole = manifest.encode(replace(held, files=sizes))
        replace_file(self._disk, f"{hidden}/{manifest.FILE_NAME}", whole)

    def _settle(
        self, hidden: str, name: str, image: Image, ours: list[int], table: bytes, threads: int
    ) -> None:
        """Sync a weights file, and meanwhile read its chunks back and compare them."""

        def compare(at: int) -> None:
            chunk = image.chunks[at]
            expected = table[at * HASH_BYTES : (at + 1) * HASH_BYTES]
            if not _has_hash(image.read(self._disk, hidden, chunk), expected):
                raise SlotDamaged(f"{chunk.tensor} does not read back as it was written")

        with beside(partial(self._disk.sync, f"{hidden}/{name}"), threads):
            for _ in ahead(compare, ours, threads):
                pass

    def swap(self, hidden: str) -> None:
        """Make `hidden` the public directory, and the public one hidden; durable."""
        if not self._disk.is_directory(self.public):
            self._disk.rename(hidden, self.public)
            self._disk.sync("models")
            return
        try:
            self._disk.exchange(hidden, self.public)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # For an instant there is no public directory: a reader fails, it never sees a mixture.
            self._disk.rename(self.public, self._old)
            self._disk.rename(hidden, self.public)
            self._disk.rename(self._old, hidden)
        self._disk.sync("models")

    def remove_spare(self) -> None:
        """Remove all hidden directories but the first, unless somebody reads them."""
        for hidden in self._hidden[1:]:
            if self._disk.is_directory(hidden) and not self._disk.is_leased(hidden):
                self._empty(hidden)
                self._disk.remove(hidden)

    def _empty_hidden(self, spared: tuple[str, ...]) -> str:
        for hidden in self._hidden:
            if hidden in spared or self._disk.is_leased(hidden):
                continue
            if self._disk.is_directory(hidden):
                self._empty(hidden)
            else:
                self._disk.make_directory(hidden)
            return hidden
        raise DiskError(
            f"{MAX_HIDDEN} old generations are being read under a lease; end some of the readers"
        )

    def _empty(self, directory: str) -> None:
        """Remove its files. What is left of them after a crash is believed chunk by chunk only."""
        for name in self._disk.names(directory):
            path = f"{directory}/{name}"
            if self._disk.is_directory(path):
                self._empty(path)
            self._disk.remove(path)

    def _other_files(self, source: str, image: Image) -> Iterator[str]:
        for name in self._disk.names(source):
            is_ours = name == manifest.FILE_NAME or name.endswith(".draft")
            is_plain = not self._disk.is_directory(f"{source}/{name}")
            if name not in image.headers and not is_ours and is_plain:
                yield name

    def _copy(self, source: str, target: str) -> None:
        size = self._disk.size(source)
        self._disk.create(target, size)
        for at in range(0, size, PIECE_BYTES):
            self._disk.write(target, at, self._disk.read(source, at, PIECE_BYTES))
        self._disk.sync(target)


def _has_hash(words: Words, expected: bytes) -> bool:
    return digest(words) == expected
