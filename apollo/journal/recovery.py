"""Opens a journal: finds the newest generation that is whole, and makes it the public one.

    newest whole manifest -> segments after the public generation, every hash -> newest good one
        -> what does not verify is set aside -> the newest becomes public, if it is not

What is public was synced before it was swapped in, so it is believed; segments that are not needed
now are looked at by `scrub`. A public directory that is newer than all that verifies starts a new
chain: nothing that was committed is given up, only the way back.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from apollo.journal import chain as chains
from apollo.journal.chain import Chain, Generation, StoredFile
from apollo.journal.codec import MAX_WORDS
from apollo.journal.disk import Disk
from apollo.journal.image import Image, root
from apollo.journal.journal import Journal
from apollo.journal.segment import SegmentDamaged, SegmentWriter
from apollo.journal.slots import Slots
from apollo.journal.values import WeightsDamaged
from apollo.weights.manifest import Manifest

MAX_ASIDE: Final = 999


class NothingToRecover(Exception):
    """There is no complete model directory of that name."""


@dataclass(frozen=True)
class Recovered:
    """What opening a journal found and did."""

    journal: Journal
    set_aside: tuple[str, ...] = ()
    """Files that did not verify, or that follow one; they lie in state/NAME/aside-*."""
    published: int | None = None
    """The generation that was made public, if it was not."""


def open_journal(
    disk: Disk,
    name: str,
    *,
    chunk_words: int = MAX_WORDS,
    progress: Callable[[str], None] = lambda note: None,
) -> Recovered:
    """Open the journal of the model at models/`name`, or begin one.

    Idempotent, and safe to interrupt anywhere. Raises NothingToRecover without a public directory.
    """
    slots = Slots(disk, name)
    slots.mend()
    folder = f"state/{name}/journal"
    _make_directories(disk, folder)
    held = slots.manifest(slots.public)
    if held is None:
        raise NothingToRecover(f"models/{name} has no manifest that can be read")
    chain, damaged = chains.read_newest(disk, folder)
    if chain is None:
        aside = _set_aside(disk, name, folder, set(disk.names(folder)))
        return Recovered(_begin(disk, folder, slots, held, chunk_words, 1), aside)
    image = Image.of(disk, slots.public, chain.chunk_words)
    journal = Journal(disk, folder, slots, chain, image)
    good = _verified(journal, held.generation)
    if not good or good[-1].generation < held.generation:
        # The public directory holds what the chain has lost.
        aside = _set_aside(disk, name, folder, set(disk.names(folder)))
        sequence = chain.sequence + 1
        return Recovered(_begin(disk, folder, slots, held, chain.chunk_words, sequence), aside)
    aside = ()
    if damaged or len(good) < len(chain.generations):
        known = {each.segment.name for each in good}
        bad = set(disk.names(folder)) - known - {chains.manifest_name(chain.sequence)}
        bad -= {each.optimizer.name for each in good if each.optimizer is not None}
        # First the manifest that does without them, under a number that no damaged one has.
        sequence = max(chains.sequences(disk, folder)) + 1
        chain = replace(chain, sequence=sequence, generations=good)
        chains.write(disk, folder, chain)
        journal = Journal(disk, folder, slots, chain, image)
        aside = _set_aside(disk, name, folder, bad)
    journal.remove_unnamed()
    if journal.newest.generation == held.generation:
        return Recovered(journal, aside)
    progress(f"publishing generation {journal.newest.generation}")
    return Recovered(journal, aside, journal.publish().generation)


def _verified(journal: Journal, public: int) -> tuple[Generation, ...]:
    """The generations up to the first that is damaged; those after `public` are read whole."""
    good: list[Generation] = []
    for each in journal.chain.generations:
        try:
            if each.generation > public:
                found = journal.check_segment(each)
                if root(found.table) != each.root:
                    raise SegmentDamaged(f"{each.segment.name}: its table has another root")
            elif journal.disk.size(f"{journal.folder}/{each.segment.name}") != each.segment.size:
                raise SegmentDamaged(f"{each.segment.name} has another size")
        except (SegmentDamaged, FileNotFoundError):
            break
        good.append(each)
    return tuple(good)


def _begin(
    disk: Disk, folder: str, slots: Slots, held: Manifest, chunk_words: int, sequence: int
) -> Journal:
    """A chain of one generation: what the public directory holds."""
    image = Image.of(disk, slots.public, chunk_words)
    table = image.table(disk, slots.public)
    if held.root and root(table) != held.root:
        raise WeightsDamaged(
            f"{slots.public} does not hold the weights of generation {held.generation} any more, "
            "and its journal is damaged; restore from a mirror"
        )
    name = f"base-{held.generation:08d}.rvj"
    if name in disk.names(folder):
        disk.remove(f"{folder}/{name}")
    writer = SegmentWriter(disk, f"{folder}/{name}")
    facts = {"generation": held.generation, "parent": None, "root": root(table)}
    size, seal = writer.finish(table, facts | {"version": held.weights_version})
    disk.sync(folder)
    base = Generation(
        held.generation,
        "base",
        None,
        held.weights_version,
        held.created,
        root(table),
        StoredFile(name, size, seal),
        0,
    )
    chain = Chain(sequence, chunk_words, (base,))
    chains.write(disk, folder, chain)
    return Journal(disk, folder, slots, chain, image)


def _make_directories(disk: Disk, folder: str) -> None:
    parts = folder.split("/")
    for depth in range(1, len(parts) + 1):
        path = "/".join(parts[:depth])
        if not disk.is_directory(path):
            disk.make_directory(path)
            if depth > 1:
                disk.sync("/".join(parts[: depth - 1]))


def _set_aside(disk: Disk, name: str, folder: str, names: set[str]) -> tuple[str, ...]:
    """Move files out of the journal, into a directory of their own."""
    if not names:
        return ()
    number = 1
    while disk.is_directory(aside := f"state/{name}/aside-{number:03d}"):
        number += 1
        if number > MAX_ASIDE:
            raise FileExistsError(f"remove some of state/{name}/aside-*")
    disk.make_directory(aside)
    for each in sorted(names):
        disk.rename(f"{folder}/{each}", f"{aside}/{each}")
    disk.sync(aside)
    disk.sync(folder)
    return tuple(sorted(names))
