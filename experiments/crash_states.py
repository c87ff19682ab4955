"""A million disks that a loss of power may leave behind, and what a reader and recovery find there.

    .venv/bin/python -m experiments.crash_states --states 1000000 --folder crash_states

Random lives of a journal (commits, publications, returns, restarts) run on a model of a disk that
forgets what was not synced (`tests/model_disk.py`). Every distinct disk is checked: a stock load of
the public directory gives exactly one committed generation, recovery gives the newest durable one.
A life follows from its number, of which the first is `--seed`. The folder keeps what was checked:
the same command goes on where it was cut. Ends with an error, and the number of the life, at the
first disk where something is wrong.
"""

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from experiments import frame
from tests.crashes import Story, Workload, first_disk, random_life, run_life

DIGEST_BYTES = 12
PER_WINDOW = 600
NUM_NESTED = 6


def check_life(number: int) -> tuple[int, set[bytes]]:
    """Every crash of one life, by its number: even ones can exchange directories."""
    can_exchange = number % 2 == 0
    start = first_disk(can_exchange=can_exchange).image
    life = Workload(f"life {number}", start, Story(), random_life(number), can_exchange)
    return number, run_life(life, PER_WINDOW, NUM_NESTED, number)


class Progress:
    """Which lives were checked, and the digests of all disks so far; on disk after each life."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lives = frame.Finished(folder / "lives.jsonl")
        self._digests = folder / "digests.bin"
        self.lives: set[int] = {row["life"] for row in self._lives.rows}
        data = self._digests.read_bytes() if self._digests.exists() else b""
        whole = len(data) - len(data) % DIGEST_BYTES
        self.seen = {data[at : at + DIGEST_BYTES] for at in range(0, whole, DIGEST_BYTES)}

    def add(self, life: int, digests: set[bytes]) -> None:
        new = digests - self.seen
        with self._digests.open("ab") as file:
            file.write(b"".join(sorted(new)))
        self._lives.add({"life": life, "disks": len(digests), "new": len(new)})
        self.lives.add(life)
        self.seen |= new


def numbers(progress: Progress, first: int, wanted: int) -> Iterator[int]:
    """Lives that were not checked yet, until there are enough disks."""
    number = first
    while len(progress.seen) < wanted:
        if number not in progress.lives:
            yield number
        number += 1


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--states", type=int, default=1_000_000, help="distinct disks to check")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--folder", type=Path, default=Path("crash_states"), help="of the progress")
    parser.add_argument("--json", type=Path, help="write the summary here")
    arguments = frame.begin(parser)
    progress = Progress(arguments.folder)
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        lives = numbers(progress, arguments.seed, arguments.states)
        running = {pool.submit(check_life, number) for number in islice(lives, 2 * workers)}
        while running:
            done = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            running.remove(done)
            life, digests = done.result()
            progress.add(life, digests)
            if (number := next(lives, None)) is not None:
                running.add(pool.submit(check_life, number))
            if len(progress.lives) % 20 == 0 or not running:
                num_lives, num_disks = len(progress.lives), len(progress.seen)
                frame.say(f"{num_lives:5} lives, {num_disks:9,} distinct disks, none wrong")
    found = {"lives": len(progress.lives), "distinct_disks": len(progress.seen)}
    frame.keep(arguments.json, arguments, found)  # A wrong one has ended the script before.


if __name__ == "__main__":
    main()
