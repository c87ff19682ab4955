"""After a loss of power at any operation one generation is seen, and the newest comes back.

The mutations show that this can fail: a journal without any one of its syncs, or with one of them
on the wrong side of its neighbour, is found out.
"""

import ast
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import pytest

from apollo.journal import journal
from tests.crashes import (
    FOLDER,
    Story,
    Violation,
    Workload,
    check,
    first_disk,
    open_,
    recover,
    run_life,
    whole_lives,
)
from tests.model_disk import (
    Crash,
    Image,
    Mark,
    ModelDisk,
    Names,
    Operation,
    Sync,
    crashes,
    whole_image,
)

NUM_RANDOM_LIVES = 36
PER_WINDOW = 450
NUM_NESTED = 4
WANTED_STATES = 100_000
LAST = "without exchange, the last rename only gives the old directory its hidden name"
TWIN = "the rename is that of the twin, and the manifest itself was renamed before"
COMMUTING = {
    ("Sync chain._put < chain.replace_file", "Names chain._put < chain.replace_file"): (
        "the directory is hidden, and is synced before it is swapped in"
    ),
    ("Names chain._put < chain.write", "Sync chain.write < journal._set_durably"): TWIN,
    ("Names chain._put < chain.write", "Sync chain.write < recovery._open"): TWIN,
    ("Sync chain.replace_file < slots._write", "Names slots.swap < journal.publish"): (
        "without exchange, the first of the two renames only takes the old directory away"
    ),
    ("Names slots.swap < journal.publish", "Sync slots.swap < journal.publish"): LAST,
    ("Names slots.swap < journal.publish", "Sync slots.mend < recovery._open"): LAST,
}
"""Neighbours whose order does not matter, and why."""


def _run(at: int) -> set[bytes]:
    return run_life(whole_lives(NUM_RANDOM_LIVES, 0)[at], PER_WINDOW, NUM_NESTED, 0)


@pytest.mark.timeout(600)
def test_every_crash_state_recovers_to_the_newest_durable_generation() -> None:
    num_lives = len(whole_lives(NUM_RANDOM_LIVES, 0))
    seen: set[bytes] = set()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for digests in pool.map(_run, range(num_lives)):
            seen |= digests
    print(f"{len(seen)} distinct crash states")
    assert len(seen) >= WANTED_STATES


def _site(depth: int) -> str:
    """The two innermost functions of the journal that are running, with the line in the first."""
    frame, found = sys._getframe(depth), list[str]()
    while frame is not None and len(found) < 2:
        code = frame.f_code
        folder, file = os.path.split(code.co_filename)
        if folder.endswith("journal"):
            line = "" if found else f":{frame.f_lineno - code.co_firstlineno}"
            found.append(f"{file.removesuffix('.py')}.{code.co_name}{line}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


class Witness(ModelDisk):
    """Notes who asked for each operation, and forgets the syncs of one place."""

    forgotten = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sites: dict[int, str] = {}

    def sync(self, path: str) -> None:
        if _site(2) != self.forgotten:
            self.sites[len(self.log)] = _site(2)
            super().sync(path)

    def _change(self, *changes: tuple[int, str, int | None], is_exchange: bool = False) -> None:
        self.sites[len(self.log)] = _site(3)
        super()._change(*changes, is_exchange=is_exchange)


def lived(life: Workload, forgotten: str = "") -> tuple[Witness, Story]:
    disk = Witness(life.start, life.can_exchange)
    disk.forgotten = forgotten
    story = Story(dict(life.story.states), dict(life.story.optimizers))
    life.run(disk, story)
    return disk, story


def first_violation(life: Workload, disk: ModelDisk, story: Story, per_window: int) -> str | None:
    for crash in crashes(disk, per_window, 0):
        try:
            check(Crash(crash.image, crash.marks), story, can_exchange=life.can_exchange)
        except Violation as violation:
            return str(violation)
    return None


def begun_again() -> Workload:
    """A journal that is begun where a beginning was cut short: its file lacks a piece."""
    disk, story = first_disk(), Story()
    open_(disk)
    whole = whole_image(disk)
    (base,) = [path for path in whole.files if "/base-" in path]
    files = {path: data for path, data in whole.files.items() if not path.startswith(FOLDER)}
    files[base] = whole.files[base][:8] + bytes(32) + whole.files[base][40:]  # Of its table.
    return Workload("begun again", Image(files, whole.directories), story, recover)


def syncs_of(life: Workload) -> set[str]:
    disk, _ = lived(life)
    return {disk.sites[at] for at, each in enumerate(disk.log) if isinstance(each, Sync)}


LIVES = [*whole_lives(2, 0), begun_again()]
LIVES.sort(key=lambda life: len(lived(life)[0].log))  # A short one shows it soonest.
SYNCS = [syncs_of(life) for life in LIVES]


def sync_sites() -> list[str]:
    """Every place of the journal that syncs."""
    return sorted(set[str]().union(*SYNCS))


WITHOUT_HARM = {
    "recovery.open_journal": "it only asks whether the disk is there; see test_rot",
    "recovery._set_aside": "of what is damaged already; it has a test of its own",
    "slots.swap": "there are two, and one is for a public directory that somebody has removed",
}
"""Functions of which not every sync is in these lives, and why."""


def test_every_sync_of_the_journal_is_in_these_lives() -> None:
    there: Counter[str] = Counter()
    for path in sorted(Path(journal.__file__).parent.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name != "sync":
                calls = [each for each in ast.walk(function) if isinstance(each, ast.Attribute)]
                number = sum(each.attr == "sync" for each in calls)
                if number:
                    there[f"{path.stem}.{function.name}"] += number
    found = Counter(
        site.partition(" < ")[0].partition(":")[0] for site in set(_lines(sync_sites()))
    )
    found["slots._settle"] = found.pop("ahead.beside", 0)  # Which makes it, beside other work.
    assert {name for name in there if there[name] != found[name]} == set(WITHOUT_HARM)


def _lines(sites: Iterable[str]) -> Iterator[str]:
    """Without who called the function, which may be several."""
    return (site.partition(" < ")[0] for site in sites)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("site", sync_sites())
def test_without_any_one_sync_a_crash_does_harm(site: str) -> None:
    lives = [life for life, syncs in zip(LIVES, SYNCS, strict=True) if site in syncs]
    assert any(first_violation(life, *lived(life, site), per_window=150) for life in lives)


def swappable(disk: Witness) -> Iterator[tuple[int, tuple[str, str]]]:
    """Neighbours in the log, one of them a sync, whose order could matter, and their places.

    Two syncs can change places, and so can a sync and the coming or going of one name: neither says
    anything of the other. Nor can a sync come too early for what it does not sync. What is left: a
    sync, and a rename, an exchange or an acknowledgement.
    """
    for at, (one, two) in enumerate(pairwise(disk.log)):
        kinds = [_kind(one), _kind(two)]
        is_too_late = isinstance(two, Sync) and not (
            isinstance(one, Names) and two.node in one.directories
        )
        if "Sync" in kinds and None not in kinds and not is_too_late:
            places = [disk.sites.get(at, "told"), disk.sites.get(at + 1, "told")]
            yield at, (f"{kinds[0]} {places[0]}", f"{kinds[1]} {places[1]}")


def _kind(operation: Operation) -> str | None:
    if isinstance(operation, Sync):
        return "Sync"
    if isinstance(operation, Names) and len(operation.changes) == 2:
        return "Exchange" if operation.is_exchange else "Names"
    is_told = isinstance(operation, Mark) and operation.what[0] == "acknowledged"
    return "Mark" if is_told else None


def pairs() -> list[tuple[str, str]]:
    found = dict.fromkeys(pair for disk, _ in map(lived, LIVES) for _, pair in swappable(disk))
    return list(found)


def _without_lines(pair: tuple[str, str]) -> tuple[str, str]:
    def plain(place: str) -> str:
        head, arrow, tail = place.partition(" < ")
        return head.partition(":")[0] + arrow + tail

    return plain(pair[0]), plain(pair[1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pair", pairs(), ids=" then ".join)
def test_with_any_two_neighbours_swapped_a_crash_does_harm(pair: tuple[str, str]) -> None:
    is_found = False
    for life in LIVES:
        disk, story = lived(life)
        if places := [at for at, each in swappable(disk) if each == pair]:
            for at in places:
                disk.log[at], disk.log[at + 1] = disk.log[at + 1], disk.log[at]
            is_found = is_found or first_violation(life, disk, story, per_window=60) is not None
    assert is_found != (_without_lines(pair) in COMMUTING)
