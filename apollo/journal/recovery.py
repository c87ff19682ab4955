"""Opens a journal: finds the newest generation that is whole, and makes it the public one.

    newest whole manifest -> segments after the public generation, every hash -> newest good one
        -> what does not verify is set aside -> the newest becomes public, if it is not

What is public was synced before it was swapped in, so it is believed; segments that are not needed
now are looked at by `scrub`. Where the chain that leads to the public generation is damaged, that
generation becomes a base: nothing that was committed is given up, only the way back.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from apollo.journal import chain as chains
from apollo.journal.chain import Chain, Generation, StoredFile
from apollo.journal.codec import MAX_WORDS
from apollo.journal.disk import Disk, DiskFailed
from apollo.journal.image import Image, ImageError, root
from apollo.journal.journal import Journal
from apollo.journal.segment import SegmentDamaged, SegmentWriter
from apollo.journal.slots import Slots
from apollo.journal.values import Slot, WeightsDamaged
from apollo.weights.manifest import Manifest

MAX_ASIDE: Final = 999
_UNREADABLE: Final = (FileNotFoundError, ImageError, DiskFailed)
"""A bad sector is damage like any other: there may be a copy."""


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
    threads: int = 1,
    progress: Callable[[str], None] = lambda note: None,
) -> Recovered:
    """Open the journal of the model at models/`name`, or begin one.

    Idempotent, and safe to interrupt anywhere. Raises NothingToRecover without a public directory,
    WeightsDamaged if no copy of something is good, DiskFailed if the disk goes away meanwhile.
    Nothing is believed before it is durable: whoever was killed may have left it in memory only.
    """
    try:
        return _open(disk, name, chunk_words, threads, progress)
    except (NothingToRecover, WeightsDamaged):
        disk.sync("models")  # A disk that is gone says so here: nothing is known to be damaged.
        raise


def _open(
    disk: Disk, name: str, chunk_words: int, threads: int, progress: Callable[[str], None]
) -> Recovered:
    slots = Slots(disk, name)
    slots.mend()
    folder = f"state/{name}/journal"
    _make_directories(disk, folder)
    disk.sync(folder)
    found = slots.slots()
    if not found:
        raise NothingToRecover(f"models/{name} has no manifest that can be read")
    held = slots.require(found[0].directory)
    chain, damaged = chains.read_newest(disk, folder)
    if chain is None:
        # Without a manifest there may be what an interrupted beginning left: it is made anew.
        begun = {each for each in disk.names(folder) if not damaged and _is_beginning(each)}
        for each in begun:
            disk.remove(f"{folder}/{each}")
        aside = _set_aside(disk, name, folder, set(disk.names(folder)))
        image = Image.of(disk, found[0].directory, chunk_words)
        base = _write_base(disk, folder, found[0].directory, image, held, threads)
        chain = chains.write(disk, folder, Chain(1, chunk_words, image.headers_hash, (base,)))
    else:
        image = _image_of(disk, found, chain)
        journal, aside = Journal(disk, folder, slots, chain, image, threads), ()
        good = _whole(journal, held.generation)
        if good is None:  # What leads to this generation is damaged, or lost: it is a new base.
            base = _write_base(disk, folder, found[0].directory, image, held, threads)
            if (known := chain.find(held.generation)) is not None:
                base = replace(known, kind="base", parent=None, num_changed=0, segment=base.segment)
            good = (base, *_whole_after(journal, held.generation))
        is_damaged = bool(damaged) or good != chain.generations
        if is_damaged or not chains.has_twin(disk, folder, chain):
            # First the manifest that does without them, under a number that no damaged one has.
            numbers = chains.sequences(disk, folder)
            chain = replace(chain, sequence=max(numbers) + 1, generations=good)
            chain = chains.write(disk, folder, chain)
        if is_damaged:
            whole = {chains.manifest_name(number) for number in chains.sequences(disk, folder)}
            needed = chain.files() | (whole - set(damaged))
            aside = _set_aside(disk, name, folder, set(disk.names(folder)) - needed)
    journal = Journal(disk, folder, slots, chain, image, threads)
    journal.remove_unnamed()
    if journal.newest.generation == held.generation and _is_fit(disk, slots, chain):
        return Recovered(journal, aside)
    progress(f"publishing generation {journal.newest.generation}")
    return Recovered(journal, aside, journal.publish(is_forced=True).generation)


def _is_fit(disk: Disk, slots: Slots, chain: Chain) -> bool:
    """Whether a loader can read the public directory, as far as headers tell."""
    if slots.manifest(slots.public) is None:
        return False
    try:
        image = Image.of(disk, slots.public, chain.chunk_words)
    except _UNREADABLE:
        return False
    return _has_headers(image, chain.headers)


def _image_of(disk: Disk, found: Sequence[Slot], chain: Chain) -> Image:
    """The chunks of the model, from a directory with the right headers.

    Raises WeightsDamaged if there is none.
    """
    for slot in found:
        try:
            image = Image.of(disk, slot.directory, chain.chunk_words)
        except _UNREADABLE:
            continue
        if _has_headers(image, chain.headers):
            return image
    raise WeightsDamaged(
        f"the headers of the weights files in {found[0].directory} are damaged; "
        "restore from a mirror"
    )


def _has_headers(image: Image, expected: str) -> bool:
    return image.headers_hash == expected


def _whole(journal: Journal, generation: int) -> tuple[Generation, ...] | None:
    """The generations that are whole, if all up to `generation` seem so; otherwise None.

    Of those the sizes are looked at: `scrub` reads the rest.
    """
    old = [each for each in journal.chain.generations if each.generation <= generation]
    try:
        for each in old:
            if journal.disk.size(f"{journal.folder}/{each.segment.name}") != each.segment.size:
                return None
        journal.values.table(generation)
    except (SegmentDamaged, KeyError, *_UNREADABLE):
        return None
    return (*old, *_whole_after(journal, generation))


def _whole_after(journal: Journal, generation: int) -> Iterator[Generation]:
    """Those that follow `generation`, up to the first that is damaged: read wholly."""
    parent = generation
    for each in journal.chain.generations:
        if each.generation <= generation:
            continue
        try:
            if each.parent != parent:
                return
            journal.check_segment(each)
        except (SegmentDamaged, *_UNREADABLE):
            return
        parent = each.generation
        yield each


def _write_base(
    disk: Disk, folder: str, directory: str, image: Image, held: Manifest, threads: int
) -> Generation:
    """A generation that needs no other: what `directory` holds. Durable but for a manifest."""
    table = image.table(disk, directory, threads)
    if held.root and not _has_root(table, held.root):
        raise WeightsDamaged(
            f"{directory} does not hold the weights of generation {held.generation} any more, "
            "and its journal is damaged; restore from a mirror"
        )
    name = f"base-{held.generation:08d}.rvj"
    if name in disk.names(folder):
        disk.remove(f"{folder}/{name}")
    writer = SegmentWriter(disk, f"{folder}/{name}")
    facts = {"generation": held.generation, "parent": None, "root": root(table)}
    size, seal = writer.finish(table, facts | {"version": held.weights_version})
    disk.sync(folder)  # A manifest must not find one of this name that was cut short before.
    return Generation(
        held.generation,
        "base",
        None,
        held.weights_version,
        held.created,
        root(table),
        StoredFile(name, size, seal),
        0,
    )


def _has_root(table: bytes, expected: str) -> bool:
    return root(table) == expected


def _is_beginning(name: str) -> bool:
    return name.startswith("base-") or name.endswith(".draft")


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
    disk.sync(f"state/{name}")
    for each in sorted(names):
        disk.rename(f"{folder}/{each}", f"{aside}/{each}")
    disk.sync(aside)
    disk.sync(folder)
    return tuple(sorted(names))
