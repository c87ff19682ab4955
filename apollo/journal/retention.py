"""Which generations are kept as they grow old, and how the chain does without the others.

    0 --1--> 1 --2--> 2 --3--> 3     kept: 0 and 3
    0 ---------1+2+3---------> 3     one segment, its deltas the sums of those it replaces

    thin    old segments, read whole --> merged segments --sync--> manifest --> old files go
            before the oldest that is kept, if there is a greatest age: a base instead

Deltas are added without any weights. Until the manifest is on disk nothing has changed, and after
it only files that nobody needs are left over: it may be interrupted anywhere. What does not verify
is not merged, so that no damage gets a new hash: it stays as it is, and `scrub` names it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from apollo.journal import codec
from apollo.journal.chain import Generation, StoredFile
from apollo.journal.disk import DiskFull
from apollo.journal.image import HASH_BYTES, root
from apollo.journal.journal import Journal
from apollo.journal.segment import Segment, SegmentDamaged, SegmentWriter

HOUR_S = 3600
DAY_S = 24 * HOUR_S


@dataclass(frozen=True)
class Retention:
    """How long which generations are kept."""

    all_s: float = DAY_S
    """Younger ones are all kept."""
    hourly_s: float = 7 * DAY_S
    """Of younger ones the newest of each hour is kept; of older ones the newest of each day."""
    max_age_s: float | None = None
    """Older ones are dropped, and with them the way back; None: the way back has no end."""


@dataclass(frozen=True)
class Thinned:
    """What `thin` did."""

    dropped: tuple[int, ...] = ()
    """Generations that are not kept any more."""
    damaged: tuple[str, ...] = ()
    """Reasons for which some were kept after all: their segments do not verify."""


def kept(
    generations: Sequence[Generation],
    now: float,
    must_keep: set[int],
    retention: Retention = Retention(),
) -> tuple[int, ...]:
    """Numbers of the generations, given oldest first, that are kept at the time `now`.

    The newest, the first and `must_keep` always are; a greatest age drops the first all the same.
    Hours and days are those of UTC. Thinned again at the same time, nothing more goes.
    """
    needed = must_keep | {generations[-1].generation}
    found = []
    hours_and_days: set[tuple[int, int]] = set()
    for each in reversed(generations):
        age_s = now - each.created
        hour, day = (HOUR_S, int(each.created // HOUR_S)), (DAY_S, int(each.created // DAY_S))
        bucket = hour if age_s <= retention.hourly_s else day
        is_newest = bucket not in hours_and_days
        if age_s <= retention.all_s or is_newest or each.generation in needed:
            found.append(each)
        hours_and_days |= {hour, day}
    if found[-1].generation != generations[0].generation:
        found.append(generations[0])
    found.reverse()
    if retention.max_age_s is not None:
        while found[0].generation not in needed and now - found[0].created > retention.max_age_s:
            del found[0]
    return tuple(each.generation for each in found)


def thin(
    journal: Journal,
    now: float,
    retention: Retention = Retention(),
    unwanted: Collection[int] = (),
) -> Thinned:
    """Drop the generations that have grown too old, or are unwanted; durable when it returns.

    What a model directory holds is kept, and all that is not public yet. Raises DiskFull with all
    that was kept before, or all that is to be kept.
    """
    old = journal.chain.generations
    needed = _needed(journal)
    must_stay = needed | {old[0].generation}
    wanted = [g for g in old if g.generation not in unwanted or g.generation in must_stay]
    numbers = kept(wanted, now, needed, retention)
    damaged: list[str] = []
    try:
        new = _thinned(journal, numbers, damaged)
        if new != old:
            journal.disk.sync(journal.folder)
            journal.replace_chain(new)
    except DiskFull:
        journal.remove_unnamed()
        raise
    left = {each.generation for each in new}
    dropped = [each.generation for each in old if each.generation not in left]
    return Thinned(tuple(dropped), tuple(damaged))


def _needed(journal: Journal) -> set[int]:
    """Generations from which deltas lead to all others, and those that only the journal holds."""
    held = {slot.generation for slot in journal.slots.slots()}
    public = journal.public.generation
    return held | {g.generation for g in journal.chain.generations if g.generation >= public}


def _thinned(
    journal: Journal, numbers: Sequence[int], damaged: list[str]
) -> tuple[Generation, ...]:
    """The chain with only `numbers`, and those that a damaged segment lets nobody drop.

    Writes the segments that it needs; their names are not durable yet.
    """
    old = journal.chain.generations
    first = old[0]
    if numbers[0] != first.generation:
        try:
            first = _as_base(journal, journal.find(numbers[0]))
        except SegmentDamaged as error:
            damaged.append(str(error))
            numbers = (first.generation, *numbers)
    new = [first]
    for before, after in pairwise(numbers):
        way = [each for each in old if before < each.generation <= after]
        try:
            new += way if len(way) == 1 else [_merged(journal, journal.find(before), way)]
        except SegmentDamaged as error:
            damaged.append(str(error))
            new += way
    return tuple(new)


def _as_base(journal: Journal, generation: Generation) -> Generation:
    """The generation without a parent. Raises SegmentDamaged."""
    table = journal.check_segment(generation).table
    made = replace(generation, kind="base", parent=None, num_changed=0)
    return _finished(_writer(journal, _name(made)), made, table)


def _merged(journal: Journal, start: Generation, way: Sequence[Generation]) -> Generation:
    """The last of `way` as the child of `start`, from which `way` leads. Raises SegmentDamaged."""
    segments = [journal.check_segment(each) for each in way]
    before, after = _table(journal, start), segments[-1].table
    for parent, child in pairwise([journal.values.segment(start.generation), *segments]):
        if not child.follows(parent):
            raise SegmentDamaged(f"{child.path} does not lead from the weights of its parent")
    made = replace(way[-1], parent=start.generation)
    writer = _writer(journal, _name(made))
    num_changed = 0
    for at in range(len(journal.image.chunks)):
        place = slice(at * HASH_BYTES, (at + 1) * HASH_BYTES)
        if before[place] != after[place]:
            writer.add(at, before[place], _composed(journal, segments, at))
            num_changed += 1
    return _finished(writer, replace(made, num_changed=num_changed), after)


def _table(journal: Journal, generation: Generation) -> bytes:
    table = journal.values.table(generation.generation)
    if not _has_root(table, generation.root):
        raise SegmentDamaged(f"{generation.segment.name}: its table is not what was written")
    return table


def _has_root(table: bytes, expected: str) -> bool:
    return root(table) == expected


def _composed(journal: Journal, segments: Sequence[Segment], at: int) -> bytes:
    chunk = journal.image.chunks[at]
    deltas = [each.delta(journal.disk, at) for each in segments if at in each.deltas]
    some = [delta for delta in deltas if delta is not None]
    if len(some) == 1:
        return some[0]
    return codec.compose(some, chunk.num_words, chunk.word_bytes)


def _name(generation: Generation) -> str:
    if generation.parent is None:
        return f"base-{generation.generation:08d}.rvj"
    return f"{generation.parent:08d}-{generation.generation:08d}.rvj"


def _writer(journal: Journal, name: str) -> SegmentWriter:
    if name in journal.disk.names(journal.folder):  # An interrupted run may have left it.
        journal.disk.remove(f"{journal.folder}/{name}")
    return SegmentWriter(journal.disk, f"{journal.folder}/{name}")


def _finished(writer: SegmentWriter, made: Generation, table: bytes) -> Generation:
    facts = {"generation": made.generation, "parent": made.parent, "root": made.root}
    size, seal = writer.finish(table, facts | {"version": made.weights_version})
    return replace(made, segment=StoredFile(_name(made), size, seal))
