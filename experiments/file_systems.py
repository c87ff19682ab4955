"""Power cuts, kills and a full disk on ext4, xfs and btrfs: the journal on what people really have.

    .venv/bin/python -m experiments.file_systems --json file_systems.json     # as root, 20 minutes
    .venv/bin/python -m experiments.file_systems --on ext4 --cuts 1000

    child     open the journal, then commit, publish, roll back ... --begin, done--> pipe
    parent    wait a random part of a round --cut--> kill, unmount, mount: the log is replayed
              --> look, see `journal_kills`: nothing that was acknowledged is missing or mixed

For each file system, made anew in an image file and mounted through a loop device (see `volume`):

    kills     kill -9 with the file system staying up, as `journal_kills` does it
    cuts      all that was not synced is lost, in each of the ways that the file system can be cut
    full      it is filled to so many bytes: a commit and a publication raise DiskFull, with all as
              it was, and go through once there is room
    faults    the same cuts of a journal that is wrong on purpose; each must be found in some cuts

What was begun and not acknowledged may be there or not. The image lies in memory by default: the
time of a child then goes into the journal and the file system, not into a device. A violation ends
the script with an error and leaves the image, unmounted; so does a fault that is not found.
"""

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from apollo.journal.disk import DiskError, DiskFull, RealDisk, lease
from apollo.journal.journal import Journal
from apollo.journal.recovery import open_journal
from experiments import frame
from experiments.journal_kills import Kills, Known
from experiments.journal_kills_child import (
    CHUNK_WORDS,
    NAME,
    POWER_FAULTS,
    PUBLIC,
    Life,
    Violation,
    is_same,
    load_public,
    optimizer_of,
    put_model,
    run_child,
    state_of,
)
from experiments.volume import Unable, Volume, enter_namespace, require

MOUNTS: Final = {
    "ext4": ("ext4", "data=ordered,commit=300"),
    "ext4-writeback": ("ext4", "data=writeback,commit=300"),
    "xfs": ("xfs", "defaults"),
    "btrfs": ("btrfs", "commit=300"),
}
"""Kind and options. By the clock, nothing is written out in the seconds that a round takes."""
WRITTEN_OUT_SHARE: Final = 0.5
"""Of the rounds; in these all is written out once before the cut, as a kernel does at times."""
EXPECTED_AFTER_CUT: Final = ("failed DiskFailed: ", "failed WeightsDamaged: ")
"""What a child may say of a device that is gone, if it lives long enough."""
FREE_BYTES: Final = (0, 4 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20, 3 << 20)
"""What is left of a full disk. A commit takes up to 1.7 MB here, a publication 2.9 MB."""
BALLAST_BYTES: Final = (64 << 20, 1 << 20, 64 << 10, 4 << 10)
HIDDEN: Final = f"models/.{NAME}.next"
SHOWN_CHARACTERS: Final = 120
IN_MEMORY: Final = Path("/dev/shm")


@dataclass
class Cuts(Kills):
    """Rounds that end in a power cut."""

    volume: Volume = field(kw_only=True)
    way: str = field(kw_only=True)
    num_cuts: int = 0

    def new_directory(self) -> Known:
        known = super().new_directory()
        self.volume.remount()  # So that it is on the device.
        return known

    def live(self, known: Known, first: int, num_ops: int, delay_s: float | None) -> Life:
        self.volume.remount()  # What the checks have left is not to be lost in the next cut.
        if delay_s is None:
            return super().live(known, first, num_ops, None)

        rng = random.Random(f"{self.seed} {first}")

        def cut() -> None:
            before_s = rng.uniform(0, delay_s)
            time.sleep(before_s)
            if rng.random() < WRITTEN_OUT_SHARE:
                self.volume.write_out()
            time.sleep(delay_s - before_s)
            self.volume.cut(self.way)
            self.num_cuts += 1

        life = run_child(known.root, self.seed, first, num_ops, self.fault, cut)
        self.volume.remount()
        lines = [line for line in life.lines if not line.startswith(EXPECTED_AFTER_CUT)]
        return Life(lines, True, life.seconds)


def fill(volume: Volume, seed: int) -> dict[str, int]:
    """Commit and publish on a disk that is full but for some bytes; how often each was DiskFull.

    Meanwhile somebody reads the generation before, so a publication needs another directory.
    """
    root = volume.path / "full"
    put_model(root, seed)
    journal = open_journal(RealDisk(root), NAME, chunk_words=CHUNK_WORDS).journal
    commit(journal, seed, 1)
    journal.publish()
    refused = {"commit": 0, "publish": 0}
    for number, free in enumerate(FREE_BYTES, 1):
        version = 10 * number
        commit(journal, seed, version)  # So that there is something to publish.
        with lease(root / HIDDEN):
            fill_up(volume.path, free)
            refused["publish"] += is_refused(journal, root, journal.publish)
            more = partial(commit, journal, seed, version + 1)
            refused["commit"] += is_refused(journal, root, more)
        for ballast in volume.path.glob("ballast-*"):
            ballast.unlink()
        commit(journal, seed, version + 2)
        journal.publish()
        journal = open_journal(RealDisk(root), NAME, chunk_words=CHUNK_WORDS).journal
        is_it = is_same(load_public(root / PUBLIC), state_of(seed, version + 2))
        if not is_it or journal.newest.weights_version != version + 2:
            raise Violation(f"after a full disk with {free} bytes: {journal.newest}")
    return refused


def commit(journal: Journal, seed: int, version: int) -> None:
    journal.commit(state_of(seed, version), version, optimizer_of(seed, version), version)


def fill_up(directory: Path, free: int) -> None:
    """Leave so many bytes of a file system, as far as it counts in bytes."""
    spare = directory / "ballast-spare"
    allocate(spare, free)
    for size in BALLAST_BYTES:
        number = 0
        while allocate(directory / f"ballast-{size}-{number}", size):
            number += 1
    spare.unlink(missing_ok=True)


def allocate(path: Path, size: int) -> bool:
    """Whether there was room for a file of that size."""
    try:
        with path.open("xb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
        return True
    except OSError:
        return False


def is_refused(journal: Journal, root: Path, act: Callable[[], object]) -> bool:
    """Whether the disk was too full for it; raises Violation unless all is as it was then."""
    folder, newest = root / journal.folder, journal.newest
    before = sorted(path.name for path in folder.iterdir()), load_public(root / PUBLIC)
    try:
        act()
        return False
    except DiskFull:
        pass
    except DiskError as error:
        raise Violation(f"a full disk is not DiskFull: {error}") from error
    names, public = sorted(path.name for path in folder.iterdir()), load_public(root / PUBLIC)
    if names != before[0] or not is_same(public, before[1]) or journal.newest != newest:
        raise Violation(f"a full disk left {names}, generation {journal.newest.generation}")
    return True


@dataclass
class Run:
    """What is done on each file system, and what came of it."""

    folder: Path
    seed: int
    kills: int
    cuts: int
    fault_cuts: int

    def volume(self, name: str) -> Volume:
        kind, options = MOUNTS[name]
        return Volume(kind, options, Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder)))

    def file_system(self, name: str) -> dict[str, Any]:
        with self.volume(name) as volume:
            frame.say(f"{name}: mounted with {volume.options}")
            found: dict[str, Any] = {"options": volume.options, "ways": volume.ways()}
            found["fallocate"] = volume.can_allocate()
            workplace = volume.path / "kills"
            workplace.mkdir()
            kills = Kills(workplace, self.seed)
            found["exchange"] = kills.new_directory().can_exchange
            frame.say(f"{name}: {found}")
            kills.run(self.kills)
            found["kills"] = kills.summary()
            shutil.rmtree(workplace)
            found["cuts"] = {}
            for way in found["ways"]:
                frame.say(f"{name}: cuts by {way}")
                cuts = self.prepared(volume, way)
                cuts.run(self.cuts)
                found["cuts"][way] = cuts.summary()
                frame.say(f"{name}: {found['cuts'][way]}")
                shutil.rmtree(cuts.workplace)
            volume.remount()
            found["full"] = fill(volume, self.seed)
            frame.say(f"{name}: full in {found['full']}, all as it was")
        shutil.rmtree(volume.folder)
        return found

    def prepared(self, volume: Volume, way: str, fault: str = "") -> Cuts:
        workplace = volume.path / way
        workplace.mkdir()
        return Cuts(workplace, self.seed, fault, volume=volume, way=way)

    def fault(self, name: str, fault: str) -> dict[str, Any]:
        """Cut a wrong journal until that is found."""
        with self.volume(name) as volume:
            cuts = self.prepared(volume, "unplug", fault)
            try:
                cuts.run(self.fault_cuts)
                found = None
            except Violation as violation:
                found = str(violation)
        shutil.rmtree(volume.folder)
        frame.say(f"{name}: {fault}: after {cuts.num_cuts} cuts: {str(found)[:SHOWN_CHARACTERS]}")
        return {"cuts": cuts.num_cuts, "found": found}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The results on all file systems, as Markdown."""
    rows = [["file system", "kill -9", "cuts", "of these in", "took effect", "DiskFull"]]
    for name, each in found.items():
        cuts = each["cuts"].values()
        hit = Counter[str]()
        for way in cuts:
            hit.update(way["hit"])
        effect = sum(sum(way["took_effect"].values()) for way in cuts)
        parts = ", ".join(f"{count} {op}" for op, count in hit.most_common())
        times = ", ".join(f"{way['kills']} {how}" for how, way in each["cuts"].items())
        full = ", ".join(f"{count} {op}" for op, count in each["full"].items())
        rows.append([name, str(each["kills"]["kills"]), times, parts, str(effect), full])
    return as_table(rows)


def table_of_faults(found: dict[str, dict[str, Any]]) -> str:
    """In which cut each fault was found, as Markdown."""
    rows = [["fault", *found]]
    for fault in POWER_FAULTS:
        by_name = [each[fault] for each in found.values()]
        cells = [str(e["cuts"]) if e["found"] else f"not in {e['cuts']}" for e in by_name]
        rows.append([fault, *cells])
    return as_table(rows)


def as_table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--on", nargs="+", choices=MOUNTS, default=list(MOUNTS), help="where")
    parser.add_argument("--kills", type=int, default=50, help="kill -9, on each")
    parser.add_argument("--cuts", type=int, default=100, help="power cuts, on each in each way")
    faults = "; ".join(f"{name}: {what}" for name, what in POWER_FAULTS.items())
    parser.add_argument("--fault-cuts", type=int, default=60, help=f"at most, of each of {faults}")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--folder", type=Path, default=IN_MEMORY, help="for the images")
    parser.add_argument("--json", type=Path, help="write the summary here")
    args = frame.begin(parser)
    try:
        require({MOUNTS[name][0] for name in args.on})
        enter_namespace()
    except Unable as unable:
        raise SystemExit(f"{unable}; choose file systems with --on") from None
    folder = Path(tempfile.mkdtemp(prefix="file-systems-", dir=args.folder))
    run = Run(folder, args.seed, args.kills, args.cuts, args.fault_cuts)
    is_kept = False
    found: dict[str, Any] = {}
    wrong: dict[str, Any] = {}
    try:
        for name in args.on:
            found[name] = run.file_system(name)
            wrong[name] = {each: run.fault(name, each) for each in POWER_FAULTS}
            frame.keep(args.json, args, {"file_systems": found, "faults": wrong})
    except Violation as violation:
        is_kept = True
        raise SystemExit(f"violation: {violation}; see the image in {folder}") from None
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{table(found)}\n\n{table_of_faults(wrong)}")
    if missed := [(n, f) for n, each in wrong.items() for f in each if not each[f]["found"]]:
        raise SystemExit(f"a journal that is wrong was not found out: {missed}; see --fault-cuts")


if __name__ == "__main__":
    main()
