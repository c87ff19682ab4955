"""kill -9 at random moments of commit, publish, rollback and recovery, on a real disk.

    .venv/bin/python -m experiments.journal_kills --json journal_kills.json         # 3,000 kills
    .venv/bin/python -m experiments.journal_kills --times 300 --directory /a/real/disk

    child     open the journal, then commit, publish, roll back ... --begin, done--> pipe
    parent    wait a random part of a round --SIGKILL--> look --copy--> recover the copy, compare

Each child goes on with what the one before it left, so that recoveries are killed too, also those
of killed recoveries. After each kill the parent knows which generations were acknowledged and which
one may have been under way, and it checks that

    public    before any recovery, a stock loader reads exactly the generation that reverie.json
              names: the one that was public, or the one that was being published
    newest    after a recovery (of a copy, so that the next child meets what was left) the chain
              holds every acknowledged generation and at most the one under way; the newest one is
              public, bit for bit, with its own optimizer state; an older one can be read
    aside     nothing was set aside

What a child does follows from `--seed`; when it is killed also from the machine's load. A kill
loses no page that was written, synced or not: what a loss of power leaves behind is not seen here,
it is the crash states of the tests that show it, and `file_systems`. A violation ends the script
with an error and leaves the directory as it was found.
"""

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from apollo.journal.disk import RealDisk
from apollo.journal.journal import KEPT_OPTIMIZERS, Journal
from apollo.journal.recovery import open_journal
from apollo.journal.slots import Slots
from apollo.weights import manifest
from apollo.weights.manifest import Manifest
from experiments import frame
from experiments.journal_kills_child import (
    CHUNK_WORDS,
    FAULTS,
    NAME,
    PUBLIC,
    Life,
    State,
    Violation,
    is_same,
    load_public,
    optimizer_of,
    put_model,
    run_child,
    state_of,
)

MAKING: Final = ("commit", "commit with optimizer", "rollback")
PUBLISHING: Final = ("publish", "recovery")
ROUND_OPS: Final = 6
"""Operations of an undisturbed round: delays are drawn from the time that it takes."""
MAX_OPS: Final = 64
"""A child that is not killed by then ends by itself."""
MAX_GENERATIONS: Final = 40
"""A directory with more is given up for a new one."""
NUM_MEASURED: Final = 5
NUM_OLDER_CHUNKS: Final = 4
PROGRESS_S: Final = 20.0


class UnsyncedDisk(RealDisk):
    """For a copy that nobody needs after a loss of power."""

    def sync(self, path: str) -> None:
        self.size(path)


@dataclass(frozen=True)
class Kept:
    """What is known of one generation."""

    number: int
    """Of the operation that made it: its version of the weights."""
    state: int
    """Number of the commit whose weights these are."""
    optimizer: int | None
    """Number of the commit whose optimizer state this is."""


@dataclass(frozen=True)
class Op:
    """An operation that was begun."""

    name: str
    number: int
    goal: int


@dataclass
class Known:
    """One directory: what was acknowledged in it, and what was begun since."""

    root: Path
    seed: int
    can_exchange: bool
    generations: list[Kept] = field(default_factory=lambda: [Kept(0, 0, None)])
    public: int = 0
    pending: Op | None = None

    @property
    def newest(self) -> int:
        return len(self.generations) - 1

    @property
    def under_way(self) -> str:
        """Name of the operation that a kill hit."""
        if self.pending is None:
            return "in between"
        is_idle = self.pending.name == "recovery" and self.public == self.newest
        return "recovery without work" if is_idle else self.pending.name

    def hear(self, lines: list[str]) -> None:
        """Take in what a child told; what it began last and did not end is pending."""
        for line in lines:
            what, _, rest = line.partition(" ")
            if what == "failed":
                raise Violation(f"{self.pending or 'between two operations'}: {rest}")
            if what == "begin":
                name, number, goal = rest.split()
                self.pending = Op(name.replace("_", " "), int(number), int(goal))
            else:
                self.end_pending()
                self.require(int(rest) == self.newest, f"generation {rest} was made")

    def end_pending(self) -> None:
        """The pending operation took effect."""
        assert self.pending is not None
        op, self.pending = self.pending, None
        if op.name in PUBLISHING:
            self.public = self.newest
            return
        if op.name == "rollback":
            made = replace(self.generations[op.goal], number=op.number)
        else:
            has_optimizer = op.name == "commit with optimizer"
            made = Kept(op.number, op.number, op.number if has_optimizer else None)
        self.generations.append(made)
        for at, each in enumerate(self.generations[:-KEPT_OPTIMIZERS]):
            self.generations[at] = replace(each, optimizer=None)

    def require(self, is_so: bool, found: str) -> None:
        if not is_so:
            raise Violation(
                f"{found}; acknowledged: generation {self.newest}, public {self.public}; "
                f"under way: {self.pending}"
            )

    def look(self) -> str | None:
        """Every check after a kill; returns the pending operation's name if it took effect."""
        op = self.pending
        try:
            before = self.look_at_public()
            is_made = self.look_at_recovered()
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"{op}: {type(error).__name__}: {error}") from error
        if op is not None and op.name in PUBLISHING:
            is_made = before != self.public
        self.public, self.pending = before, None
        return op.name if op is not None and is_made else None

    def look_at_public(self) -> int:
        """The public generation; nothing was recovered yet."""
        directory = self.root / PUBLIC
        if not self.can_exchange and not directory.exists():
            return self.public  # Between the two steps of a swap, see `Slots.swap`.
        held = self.held(directory)
        is_publishing = self.pending is not None and self.pending.name in PUBLISHING
        may_be = {self.public, self.newest if is_publishing else self.public}
        self.require(held.generation in may_be, f"public is generation {held.generation}")
        self.compare(held, load_public(directory))
        return held.generation

    def held(self, directory: Path) -> Manifest:
        held = manifest.read(directory)
        if held is None or not held.is_met_by(directory):
            raise Violation(f"{PUBLIC} is not complete: {held}")
        return held

    def compare(self, held: Manifest, found: State) -> None:
        kept = self.generations[held.generation]
        self.require(
            held.weights_version == kept.number,
            f"generation {held.generation} is of version {held.weights_version}",
        )
        is_it = is_same(found, state_of(self.seed, kept.state))
        self.require(is_it, f"public are not the words of generation {held.generation}")

    def look_at_recovered(self) -> bool:
        """Recover a copy; returns whether the pending operation made a generation."""
        copy = self.root.with_name(f"{self.root.name}-copy")
        shutil.copytree(self.root, copy)
        recovered = open_journal(UnsyncedDisk(copy), NAME, chunk_words=CHUNK_WORDS)
        journal = recovered.journal
        aside = ", ".join(recovered.set_aside)
        self.require(not aside, f"recovery set aside {aside}")
        number = journal.newest.generation
        is_making = self.pending is not None and self.pending.name in MAKING
        is_made = is_making and number == self.newest + 1
        self.require(is_made or number == self.newest, f"recovered is generation {number}")
        public = self.public
        if is_made:
            self.end_pending()
        versions = [each.weights_version for each in journal.chain.generations]
        expected = [each.number for each in self.generations]
        self.require(versions == expected, f"the chain has the versions {versions}")
        held = self.held(copy / PUBLIC)
        self.require(held.generation == number, f"recovery published {held.generation}")
        self.compare(held, load_public(copy / PUBLIC))
        self.compare_rest(journal)
        self.public = public
        shutil.rmtree(copy)
        return is_made

    def compare_rest(self, journal: Journal) -> None:
        """The newest optimizer state, and some chunks of some other generation."""
        expected = self.generations[-1].optimizer
        found = journal.optimizer(journal.newest)
        is_it = found == (None if expected is None else optimizer_of(self.seed, expected))
        self.require(is_it, f"the optimizer's state is not that of {expected}")
        rng = random.Random(self.generations[-1].number)
        generation = rng.randrange(len(self.generations))
        state = state_of(self.seed, self.generations[generation].state)
        for at in rng.sample(range(len(journal.image.chunks)), NUM_OLDER_CHUNKS):
            chunk = journal.image.chunks[at]
            words = state[chunk.tensor][chunk.first_word : chunk.first_word + chunk.num_words]
            is_it = np.array_equal(journal.words(at, generation), words)
            self.require(is_it, f"generation {generation} reads wrong in {chunk.tensor}")


@dataclass
class Kills:
    """All rounds of one run."""

    workplace: Path
    seed: int
    fault: str = ""
    hit: Counter[str] = field(default_factory=Counter)
    """Kills by the operation that they hit."""
    took_effect: Counter[str] = field(default_factory=Counter)
    """Of these, operations whose effect was there all the same."""
    num_rounds: int = 0
    num_directories: int = 0
    num_generations: int = 0
    round_s: float = 0.0
    """The length of an undisturbed round."""

    def new_directory(self) -> Known:
        self.num_directories += 1
        root = self.workplace / f"{self.num_directories:05d}"
        put_model(root, self.seed)
        return Known(root, self.seed, Slots(RealDisk(root), NAME).can_exchange())

    def live(self, known: Known, first: int, num_ops: int, delay_s: float | None) -> Life:
        """One child, killed after `delay_s`."""
        meanwhile = None if delay_s is None else partial(time.sleep, delay_s)
        return run_child(known.root, self.seed, first, num_ops, self.fault, meanwhile)

    def round(self, known: Known, num_ops: int, delay_s: float | None = None) -> float:
        """One child, killed after `delay_s`, and every check; returns the seconds that it had."""
        before = known.newest
        first = self.num_rounds * MAX_OPS + 1
        self.num_rounds += 1
        life = self.live(known, first, num_ops, delay_s)
        known.hear(life.lines)
        if life.is_killed:
            self.hit[known.under_way] += 1
        made = known.look()
        if made is not None:
            self.took_effect[made] += 1
        self.num_generations += known.newest - before
        return life.seconds

    def run(self, times: int) -> None:
        """Kill so many children. Raises Violation."""
        known = self.new_directory()
        self.round_s = median(self.round(known, ROUND_OPS) for _ in range(NUM_MEASURED))
        frame.say(f"a round of a recovery and {ROUND_OPS} operations: {self.round_s * 1e3:.0f} ms")
        rng = random.Random(self.seed)
        told = time.perf_counter()
        while self.hit.total() < times:
            if known.newest > MAX_GENERATIONS:
                shutil.rmtree(known.root)
                known = self.new_directory()
            self.round(known, MAX_OPS, rng.uniform(0, self.round_s))
            if time.perf_counter() - told > PROGRESS_S:
                told = time.perf_counter()
                frame.say(f"{self.hit.total()} kills: {dict(self.hit)}")

    def summary(self) -> dict[str, Any]:
        """What was done, for a person and for JSON."""
        return {
            "kills": self.hit.total(),
            "seed": self.seed,
            "hit": dict(self.hit.most_common()),
            "took_effect": dict(self.took_effect.most_common()),
            "directories": self.num_directories,
            "generations": self.num_generations,
            "round_ms": round(self.round_s * 1e3, 1),
        }


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--times", type=int, default=3000, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--directory", type=Path, help="where to work; its file system counts")
    parser.add_argument("--json", type=Path, help="write the summary here")
    faults = "; ".join(f"{name}: {what}" for name, what in FAULTS.items())
    parser.add_argument("--fault", choices=FAULTS, default="", help=f"must be found: {faults}")
    args = frame.begin(parser)
    workplace = Path(tempfile.mkdtemp(prefix="journal-kills-", dir=args.directory))
    kills = Kills(workplace, args.seed, args.fault)
    try:
        kills.run(args.times)
    except Violation as violation:
        raise SystemExit(
            f"violation after {kills.hit.total()} kills: {violation}; see {workplace}"
        ) from None
    shutil.rmtree(workplace)
    print(json.dumps(kills.summary(), indent=2))
    frame.keep(args.json, args, kills.summary())


if __name__ == "__main__":
    main()
