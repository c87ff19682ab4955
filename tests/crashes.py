"""Workloads of the journal on a disk that loses power, and what must hold after each crash.

After every crash: a stock load of the public directory gives exactly one committed generation; then
recovery gives the newest durable one, with its optimizer, sets nothing aside, and every generation
that is kept can be read.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from apollo.journal import chain as chains
from apollo.journal.chain import read_newest
from apollo.journal.disk import Disk
from apollo.journal.journal import Journal
from apollo.journal.recovery import NothingToRecover, open_journal
from apollo.journal.retention import DAY_S, Retention, thin
from apollo.journal.scrub import scrub
from apollo.weights import manifest
from tests.model_disk import Crash, Image, Killed, ModelDisk, crashes, whole_image
from tests.small_model import (
    CHUNK_WORDS,
    CONFIG,
    NAME,
    PUBLIC,
    State,
    first_state,
    is_same,
    learned,
    load_public,
    put_model,
)

FOLDER = f"state/{NAME}/journal"
HIDDEN = f"models/.{NAME}."
THREADS = 1
"""Of the journal; with more it does the same to a disk."""
KINDS = ("commit", "commit", "publish", "publish", "roll back", "thin", "restart", "kill")
FAR_S = 400 * DAY_S
"""So long after a life all of its generations count as old."""


class Violation(Exception):
    """A crash after which something is not as it must be."""


@dataclass
class Story:
    """What a workload has done so far: the states of all generations, by number."""

    states: dict[int, State] = field(default_factory=lambda: {0: first_state()})
    optimizers: dict[int, bytes | None] = field(default_factory=lambda: {0: None})


def open_(disk: Disk) -> Journal:
    return open_journal(disk, NAME, chunk_words=CHUNK_WORDS, threads=THREADS).journal


class Teller:
    """Runs operations of a journal and marks in the log what is begun and what is acknowledged."""

    def __init__(self, disk: ModelDisk, story: Story) -> None:
        self.disk = disk
        self.story = story
        self.journal = open_(disk)
        # Whether it was told or not before a kill: what a recovery has found must stay.
        disk.mark(("recovered", self.journal.newest.generation))
        self._seed = 100 * len(story.states)

    def commit(self, *, with_optimizer: bool = True) -> None:
        newest = self.journal.newest.generation
        self._seed += 1
        state = learned(self.story.states[newest], self._seed)
        optimizer = f"moments {self._seed}".encode() * 3 if with_optimizer else None
        self._begin(newest + 1, state, optimizer)
        version = self.journal.newest.weights_version + 1
        made = self.journal.commit(state, version, optimizer, newest + 1)
        self.disk.mark(("acknowledged", made.generation))

    def roll_back(self, generation: int) -> None:
        number = self.journal.newest.generation + 1
        goal = self.journal.find(generation)
        optimizer = None if goal.optimizer is None else self.story.optimizers[generation]
        self._begin(number, self.story.states[generation], optimizer)
        version = self.journal.newest.weights_version + 1
        made = self.journal.roll_back(generation, version)
        self.disk.mark(("acknowledged", made.generation))

    def publish(self) -> None:
        self.journal.publish()

    def thin(self, max_age_s: float | None = None) -> None:
        thin(self.journal, time.time() + FAR_S, Retention(max_age_s=max_age_s))

    def killed(
        self, operation: Callable[[], object], is_mortal: Callable[[str, str], bool]
    ) -> "Teller":
        """Who comes after the process was killed in an operation; the power has not failed."""
        self.disk.is_mortal = is_mortal
        with suppress(Killed):
            operation()
        self.disk.is_mortal = None
        return Teller(self.disk, self.story)

    def _begin(self, number: int, state: State, optimizer: bytes | None) -> None:
        self.story.states[number] = state
        self.story.optimizers[number] = optimizer
        self.disk.mark(("begun", number))


def first_disk(*, can_exchange: bool = True) -> ModelDisk:
    disk = ModelDisk(Image({}, frozenset()), can_exchange)
    put_model(disk, first_state())
    return ModelDisk(whole_image(disk), can_exchange)


def long_life(disk: ModelDisk, story: Story) -> None:
    """Everything that a cell does with its journal."""
    teller = Teller(disk, story)
    teller.commit()
    teller.commit()
    teller.publish()
    teller.commit(with_optimizer=False)
    teller.publish()
    teller.roll_back(1)
    teller.publish()
    teller.commit()
    teller.thin()
    teller.commit()
    open_(disk)  # A restart: what was not public becomes public.


def random_life(seed: int) -> Callable[[ModelDisk, Story], None]:
    """Operations in an order that nobody chose."""

    def run(disk: ModelDisk, story: Story) -> None:
        random = Random(seed)
        teller = Teller(disk, story)
        for _ in range(7):
            older = teller.journal.chain.generations[:-1]
            match random.choice(KINDS):
                case "commit":
                    teller.commit(with_optimizer=random.random() < 0.7)
                case "publish":
                    teller.publish()
                case "roll back" if older:
                    teller.roll_back(random.choice(older).generation)
                case "thin":
                    teller.thin(random.choice((None, FAR_S / 2)))
                case "restart":
                    teller = Teller(disk, story)
                case "kill":
                    some = (teller.commit, teller.publish, teller.thin, lambda: open_(disk))
                    teller = teller.killed(random.choice(some), after(random.randrange(30)))

    return run


def after(num_changes: int) -> Callable[[str, str], bool]:
    """Mortal after so many changes of the disk."""
    left = itertools.count(num_changes, -1)
    return lambda change, path: next(left) <= 0


def at(change: str, path: str, time: int = 1) -> Callable[[str, str], bool]:
    """Mortal at one change, when it is to be made for the so many-th time."""
    left = itertools.count(time, -1)
    return lambda *asked: asked == (change, path) and next(left) == 1


def killed_in_a_swap(disk: ModelDisk, story: Story) -> None:
    """What is public is so in memory only when the next process finds it."""
    teller = Teller(disk, story)
    teller.commit()
    teller = teller.killed(teller.publish, at("sync", "models"))
    teller.commit()
    teller.publish()


def killed_in_a_manifest(disk: ModelDisk, story: Story) -> None:
    """A manifest is there in memory only when the next process finds it."""
    teller = Teller(disk, story)
    teller.commit()
    teller = teller.killed(teller.commit, at("sync", FOLDER, time=2))
    teller.publish()
    teller.commit()


def killed_in_a_beginning(disk: ModelDisk, story: Story) -> None:
    """The journal's directories are there in memory only when the next process finds them."""
    disk.remove(f"state/{NAME}")
    disk.sync("state")
    for place in ("state", f"state/{NAME}"):
        disk.is_mortal = at("sync", place)
        with suppress(Killed):
            open_(disk)
        disk.is_mortal = None
    Teller(disk, story).commit()


def check(crash: Crash, story: Story, *, can_exchange: bool = True) -> ModelDisk:
    """Raise Violation unless a reader and a recovery find what they must; the disk after it."""
    told = [mark for mark in crash.marks if isinstance(mark, tuple)]
    acknowledged = max((n for what, n in told if what != "begun"), default=0)
    begun = max((n for what, n in told if what == "begun"), default=0)
    disk = ModelDisk(crash.image, can_exchange)
    public = _check_public(disk, story, begun)
    try:
        chain, damaged = read_newest(disk, FOLDER)
        opened = open_journal(disk, NAME, chunk_words=CHUNK_WORDS)
    except NothingToRecover:
        raise Violation("there is no public directory, and recovery finds none") from None
    except Violation:
        raise
    except Exception as error:
        raise Violation(f"recovery failed: {type(error).__name__}: {error}") from error
    newest = opened.journal.newest
    sequences = chains.sequences(disk, FOLDER)
    if sequences[1:] != [opened.journal.chain.sequence - 1]:
        raise Violation(f"of the newest manifest there is no twin: {sequences}")
    if damaged or opened.set_aside:
        raise Violation(f"a crash alone must damage nothing: {damaged}, {opened.set_aside}")
    if not acknowledged <= newest.generation <= begun:
        raise Violation(
            f"recovered {newest.generation}; acknowledged {acknowledged}, begun {begun}"
        )
    if chain is not None and newest.generation != chain.newest.generation:
        raise Violation(f"durable was {chain.newest.generation}, recovered {newest.generation}")
    if public is not None and newest.generation < public:
        raise Violation(f"public was {public}, recovered {newest.generation}")
    if not is_same(load_public(disk), story.states[newest.generation]):
        raise Violation(f"after recovery the public weights are not those of {newest.generation}")
    held = manifest.decode(disk.read(f"{PUBLIC}/{manifest.FILE_NAME}"), "")
    if (held.generation, held.weights_version) != (newest.generation, newest.weights_version):
        raise Violation("reverie.json names another generation than the journal")
    expected = story.optimizers[newest.generation]
    if newest.kind != "base" and opened.journal.optimizer(newest) != expected:
        raise Violation(f"generation {newest.generation} came back without its optimizer")
    found = scrub(opened.journal)
    # What is left of a hidden directory may be anything: it is written anew before it is shown.
    damage = [path for path in found.files if not path.startswith(HIDDEN)]
    damage += [copy.directory for copy in found.copies if not copy.directory.startswith(HIDDEN)]
    if damage or found.lost:
        raise Violation(f"a crash alone damaged {damage}, and {found.lost} cannot be read any more")
    return disk


def _check_public(disk: ModelDisk, story: Story, begun: int) -> int | None:
    """The generation that a stock loader sees; None if there is no public directory at all."""
    if not disk.is_directory(PUBLIC):
        if disk.can_exchange:
            raise Violation("there is no public directory")
        return None
    try:
        held = manifest.decode(disk.read(f"{PUBLIC}/{manifest.FILE_NAME}"), "")
        seen = load_public(disk)
    except Exception as error:
        raise Violation(f"the public directory cannot be loaded: {error}") from error
    if disk.read(f"{PUBLIC}/config.json") != CONFIG:
        raise Violation("the public config.json is not whole")
    if held.generation > begun or not is_same(seen, story.states[held.generation]):
        raise Violation(f"the public directory is not generation {held.generation}, as it says")
    return held.generation


@dataclass(frozen=True)
class Workload:
    """Operations from a disk on, and whether that disk can exchange directories."""

    name: str
    start: Image
    story: Story
    run: Callable[[ModelDisk, Story], None]
    can_exchange: bool = True
    marks: tuple[object, ...] = ()
    """What was begun and acknowledged before the start."""


def recover(disk: ModelDisk, story: Story) -> None:
    """A recovery that is interrupted itself."""
    open_(disk)


def whole_lives(num_random: int, seed: int) -> list[Workload]:
    """The long life, and random ones, with and without exchange."""
    lives: dict[str, Callable[[ModelDisk, Story], None]] = {
        "the long life": long_life,
        "killed in a swap": killed_in_a_swap,
        "killed in a manifest": killed_in_a_manifest,
        "killed in a beginning": killed_in_a_beginning,
    }
    lives |= {f"life {seed + at}": random_life(seed + at) for at in range(num_random)}
    found = []
    for can_exchange in (True, False):
        start = first_disk(can_exchange=can_exchange).image
        for name, life in lives.items():
            how = name if can_exchange else f"{name}, two renames"
            found.append(Workload(how, start, Story(), life, can_exchange))
    return found


def nested(whole: Workload, count: int, seed: int) -> Iterator[Workload]:
    """Recoveries from crashes within a workload."""
    disk = ModelDisk(whole.start, whole.can_exchange)
    story = Story(dict(whole.story.states), dict(whole.story.optimizers))
    whole.run(disk, story)
    some = list(crashes(disk, 8, seed))
    for number, crash in enumerate(Random(seed).sample(some, min(count, len(some)))):
        name = f"recovery {number} after {whole.name}"
        yield Workload(name, crash.image, story, recover, whole.can_exchange, crash.marks)


def states_of(workload: Workload, per_window: int, seed: int) -> Iterator[tuple[Crash, Story]]:
    """All crashes of a workload that are looked at."""
    disk = ModelDisk(workload.start, workload.can_exchange)
    story = Story(dict(workload.story.states), dict(workload.story.optimizers))
    workload.run(disk, story)
    for crash in crashes(disk, per_window, seed):
        yield Crash(crash.image, (*workload.marks, *crash.marks)), story


def run(workload: Workload, per_window: int, seed: int) -> set[bytes]:
    """Check every distinct crash of a workload; returns the disks' digests. Raises Violation."""
    seen: set[bytes] = set()
    for crash, story in states_of(workload, per_window, seed):
        digest = crash.image.digest()
        if digest not in seen:
            seen.add(digest)
            try:
                check(crash, story, can_exchange=workload.can_exchange)
            except Violation as violation:
                raise Violation(f"{workload.name}: {violation}") from violation
    return seen


def run_life(whole: Workload, per_window: int, num_nested: int, seed: int) -> set[bytes]:
    """A workload, and recoveries that are interrupted after crashes of it."""
    seen = run(whole, per_window, seed)
    for workload in nested(whole, num_nested, seed):
        seen |= run(workload, per_window, seed)
    return seen
