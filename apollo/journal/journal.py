"""The journal of one model: commits, publishes, returns; a database whose rows are weights.

    commit    live words --compare hashes--> deltas --> segment, optimizer --sync--> manifest
    publish   newest generation --> hidden directory --verified, synced--> swapped with the public
    rollback  generation g as a new generation, whose deltas lead back; then publish

A generation counts from the instant its manifest is on disk. One process at a time may hold the
journal of a model. Raises DiskFull with nothing changed; after DiskFailed, open it anew, see
`recovery`.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

from apollo.journal import chain as chains
from apollo.journal import codec, segment
from apollo.journal.ahead import ahead
from apollo.journal.chain import Chain, Generation, StoredFile
from apollo.journal.changed import ChangedWords
from apollo.journal.codec import Words
from apollo.journal.disk import Disk, DiskFull
from apollo.journal.image import HASH_BYTES, Image, ImageError, digest, root
from apollo.journal.segment import Segment, SegmentWriter
from apollo.journal.slots import Slots
from apollo.journal.values import Values
from apollo.weights.manifest import Manifest

PIECE_BYTES: Final = 16 << 20
KEPT_OPTIMIZERS: Final = 2
"""Newest generations whose optimizer state is kept; a return to an older one begins it anew."""


class UnknownGeneration(ValueError):
    """There is no such generation, or it is not kept any more."""


class Journal:
    """An open journal; made by `recovery.open_journal`, which finds the state it starts from."""

    def __init__(
        self,
        disk: Disk,
        folder: str,
        slots: Slots,
        chain: Chain,
        image: Image,
        threads: int = 1,
    ) -> None:
        self.disk = disk
        self.folder = folder
        self.slots = slots
        self.image = image
        self._threads = threads
        self._set(chain)

    @property
    def chain(self) -> Chain:
        """All generations that are kept, oldest first."""
        return self._chain

    @property
    def newest(self) -> Generation:
        return self._chain.newest

    @property
    def public(self) -> Manifest:
        """What the public directory says it holds."""
        return self.slots.require(self.slots.public)

    @property
    def values(self) -> Values:
        return self._values

    def _set(self, chain: Chain) -> None:
        self._chain = chain
        self._values = Values(self.disk, self.folder, chain, self.image)

    def find(self, generation: int) -> Generation:
        """Raises UnknownGeneration."""
        found = self._chain.find(generation)
        if found is None:
            kept = [each.generation for each in self._chain.generations]
            before = [each for each in kept if each < generation][-1:]
            near = " and ".join(map(str, before + [each for each in kept if each > generation][:1]))
            raise UnknownGeneration(f"generation {generation} is not kept; nearest: {near}")
        return found

    def words(self, chunk: int, generation: int) -> Words:
        """A chunk of any kept generation. Raises WeightsDamaged, UnknownGeneration."""
        self.find(generation)
        return self._values.read(chunk, generation, self.slots.slots())

    def commit(
        self,
        live: Mapping[str, Words | ChangedWords],
        weights_version: int,
        optimizer: bytes | memoryview | None = None,
        step: int = 0,
    ) -> Generation:
        """Keep the weights as they are in `live`: by tensor, all its words or those that changed.

        They must not change meanwhile; what has changed has changed since the newest generation.
        Durable when it returns. Returns the newest generation as it is if its version is
        `weights_version`.
        """
        parent = self.newest
        if weights_version == parent.weights_version:
            return parent
        if strange := set(live) ^ {chunk.tensor for chunk in self.image.chunks}:
            raise ImageError(f"{min(strange)} is live or published, but not both")
        slots = self.slots.slots()

        def delta_of(at: int, before: bytes) -> tuple[bytes, bytes] | None:
            chunk, old = self.image.chunks[at], None
            held = live[chunk.tensor]
            if isinstance(held, ChangedWords):
                where, words = held.between(chunk.first_word, chunk.num_words)
                if not len(where):
                    return None
                old = self._values.read(at, parent.generation, slots)
                new = old.copy()
                new[where] = words
            else:
                new = held[chunk.first_word : chunk.first_word + chunk.num_words]
            after = digest(new)
            if after == before:
                return None
            if old is None:
                old = self._values.read(at, parent.generation, slots)
            return after, codec.encode(old, new)

        return self._append(
            Generation(
                parent.generation + 1,
                "commit",
                parent.generation,
                weights_version,
                time.time(),
                "",
                StoredFile("", 0, ""),
                0,
                step=step,
            ),
            delta_of,
            optimizer,
        )

    def roll_back(
        self,
        generation: int,
        weights_version: int,
        *,
        is_learned_again: bool = False,
        forgotten: tuple[str, ...] = (),
    ) -> Generation:
        """Make a new generation with the weights, and if kept the optimizer, of an earlier one.

        `weights_version` names it: a number that was never used. Durable when it returns; what is
        public is as before.
        """
        goal, parent = self.find(generation), self.newest
        slots = self.slots.slots()
        table = self._values.table(generation)

        def delta_of(at: int, before: bytes) -> tuple[bytes, bytes] | None:
            after = table[at * HASH_BYTES : (at + 1) * HASH_BYTES]
            if after == before:
                return None
            old = self._values.read(at, parent.generation, slots)
            return after, codec.encode(old, self._values.read(at, generation, slots))

        return self._append(
            Generation(
                parent.generation + 1,
                "rollback",
                parent.generation,
                weights_version,
                time.time(),
                "",
                StoredFile("", 0, ""),
                0,
                optimizer=goal.optimizer,
                step=goal.step if goal.optimizer is not None else parent.step,
                returns_to=generation,
                undone_after=goal.weights_version,
                is_learned_again=is_learned_again,
                forgotten=forgotten,
            ),
            delta_of,
            None,
        )

    def publish(self, *, is_forced: bool = False) -> Generation:
        """Make the newest generation public, or, if forced, write it anew; durable when it returns.

        Raises SlotDamaged or WeightsDamaged with the public directory as it was.
        """
        newest, slots = self.newest, self.slots.slots()
        held = self.slots.require(self.slots.first())
        is_public = held.generation == newest.generation and held.root in ("", newest.root)
        if is_public and not is_forced:
            return newest
        public = [slot for slot in slots if slot.directory == self.slots.public]
        is_enough = self._values.can_read(newest.generation, public, self._threads)
        hidden = self.slots.write(
            self.image,
            self._values.table(newest.generation),
            lambda at: self._values.read(at, newest.generation, public if is_enough else slots),
            replace(
                held,
                generation=newest.generation,
                weights_version=newest.weights_version,
                created=newest.created,
                root=newest.root,
            ),
            # What the public directory has lost is only in these.
            spared=() if is_enough else tuple(slot.directory for slot in slots),
            threads=self._threads,
        )
        self.slots.swap(hidden)
        self.slots.remove_spare()
        return newest

    def optimizer(self, generation: Generation) -> bytes | None:
        """The optimizer's state in a generation; None if none is kept, or it is damaged."""
        stored = generation.optimizer
        if stored is None:
            return None
        try:
            data = self.disk.read(f"{self.folder}/{stored.name}")
        except FileNotFoundError:
            return None
        return data if stored.holds(data) else None

    def replace_chain(self, generations: tuple[Generation, ...]) -> None:
        """Write the next manifest, then remove the files that it does not name."""
        self._set_durably(self._chain.next(generations))
        self.remove_unnamed()

    def remove_unnamed(self) -> None:
        """Remove what no manifest names: what an interrupted commit left, or retention."""
        needed = self._chain.files()
        kept = chains.sequences(self.disk, self.folder)[: chains.KEPT_MANIFESTS]
        needed |= {chains.manifest_name(sequence) for sequence in kept}
        for name in self.disk.names(self.folder):
            if name not in needed:
                self.disk.remove(f"{self.folder}/{name}")

    def _set_durably(self, chain: Chain) -> None:
        self._set(chains.write(self.disk, self.folder, chain))

    def _append(
        self,
        draft: Generation,
        delta_of: Callable[[int, bytes], tuple[bytes, bytes] | None],
        optimizer: bytes | memoryview | None,
    ) -> Generation:
        """Write the segment and the optimizer's state, then the manifest that names them.

        `delta_of` gives hash and delta of a chunk whose hash was the one given; None: unchanged.
        """
        assert draft.parent is not None
        before = self._values.table(draft.parent)
        name = f"{draft.parent:08d}-{draft.generation:08d}.rvj"
        try:
            self._remove_leftover(name)
            writer = SegmentWriter(self.disk, f"{self.folder}/{name}")
            after = bytearray(before)
            num_changed = 0
            places = [
                slice(at * HASH_BYTES, (at + 1) * HASH_BYTES)
                for at in range(len(self.image.chunks))
            ]

            def found_of(at: int) -> tuple[bytes, bytes] | None:
                return delta_of(at, before[places[at]])

            for at, found in enumerate(ahead(found_of, range(len(places)), self._threads)):
                if found is not None:
                    after[places[at]], delta = found
                    writer.add(at, before[places[at]], delta)
                    num_changed += 1
            made = replace(draft, root=root(bytes(after)), num_changed=num_changed)
            facts = {"generation": made.generation, "parent": made.parent, "root": made.root}
            size, seal = writer.finish(bytes(after), facts | {"version": made.weights_version})
            made = replace(made, segment=StoredFile(name, size, seal))
            if optimizer is not None:
                made = replace(made, optimizer=self._store_optimizer(optimizer, made.generation))
            self.disk.sync(self.folder)
            kept = _without_old_optimizers((*self._chain.generations, made))
            self._set_durably(self._chain.next(kept))
        except DiskFull:
            self.remove_unnamed()
            raise
        with suppress(DiskFull):  # It is durable; what is left over goes with the next one.
            self.remove_unnamed()
        return made

    def _store_optimizer(self, state: bytes | memoryview, generation: int) -> StoredFile:
        name = f"optimizer-{generation:08d}.safetensors"
        path, view = f"{self.folder}/{name}", memoryview(state).cast("B")
        self._remove_leftover(name)
        self.disk.create(path, len(view))
        for at in range(0, len(view), PIECE_BYTES):
            self.disk.write(path, at, view[at : at + PIECE_BYTES])
        self.disk.sync(path)
        return StoredFile(name, len(view), digest(state).hex())

    def _remove_leftover(self, name: str) -> None:
        if name in self.disk.names(self.folder):
            self.disk.remove(f"{self.folder}/{name}")

    def check_segment(self, generation: Generation) -> Segment:
        """Read a whole segment file; raises SegmentDamaged."""
        path, stored = f"{self.folder}/{generation.segment.name}", generation.segment
        segment.check(self.disk, path, stored.size, stored.hash)
        return Segment.read(self.disk, path)


def _without_old_optimizers(generations: tuple[Generation, ...]) -> tuple[Generation, ...]:
    old, new = generations[:-KEPT_OPTIMIZERS], generations[-KEPT_OPTIMIZERS:]
    return (*(replace(each, optimizer=None) for each in old), *new)
