"""Forgetting in the ledger: one sample goes, with its text; all others are learned once."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from actors.errors import Conflict, NotFound
from actors.history import MAX_ITEMS
from actors.ledger import Ledger
from actors.messages import QueuedJob, TrainingSample
from actors.past import Remembered
from actors.posted import TrainConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def accept(ledger: Ledger, *names: str, epochs: int = 1, round_id: str | None = None) -> str:
    samples = [
        TrainingSample(name, (1,), (2,), content_hash=f"hash of {name}", source="notes")
        for name in names
    ]
    return ledger.accept(samples, TrainConfig(epochs=epochs), 10_000, round_id).job_id


def front(ledger: Ledger) -> QueuedJob:
    job = ledger.next_job()
    assert job is not None
    return job


def train(ledger: Ledger, version: int, num_steps: int | None = None) -> int:
    """Train the oldest job to its end, or some steps of it; the version afterwards."""
    job = front(ledger)
    ledger.start_job(job.job_id, version)
    end = job.end if num_steps is None else job.steps_done + num_steps
    for index in range(job.steps_done, end):
        version += 1
        name = job.samples[index % len(job.samples)].id
        ledger.record_step(job.job_id, index, name, version, float(version), 0.1)
    if end == job.end:
        ledger.finish_job(job.job_id, job.ends_as, version, job.error)
    return version


def train_all(ledger: Ledger, version: int) -> int:
    while ledger.next_job() is not None:
        version = train(ledger, version)
    return version


def order(ledger: Ledger) -> list[str]:
    """Samples in the order in which the weights have learned them."""
    rows = ledger._db.execute("SELECT sample_id FROM steps ORDER BY version")
    return [row["sample_id"] for row in rows]


def return_without(ledger: Ledger, *names: str, version: int, kept: list[int]) -> int:
    """What the cell does with weights; the version of the return."""
    found = ledger.remembered(names, version, kept)
    assert found.clean_version is not None
    until = ledger.next_version()
    ledger.undo(found.clean_version, until, 0, is_again=True, besides=names)
    return until


def test_all_others_are_learned_again_once_in_the_same_order(ledger: Ledger) -> None:
    one = accept(ledger, "a", "b", "x", "c", epochs=2)
    two = accept(ledger, "d")
    version = train_all(ledger, 0)
    assert version == 9
    found = ledger.remembered(["x"], version, [0, 1, 4])
    assert found == Remembered(
        is_learned=True,
        clean_version=1,
        jobs=(one, two),
        num_steps=8,
        num_again=6,
        num_samples_again=4,
    )
    until = return_without(ledger, "x", version=version, kept=[0, 1, 4])
    assert order(ledger) == ["a"]
    job = front(ledger)
    assert [sample.id for sample in job.samples] == ["a", "b", "c"] and job.steps_done == 1
    train_all(ledger, until)
    assert order(ledger) == ["a", "b", "c", "a", "b", "c", "d"]
    assert ledger.job(one).status == ledger.job(two).status == "done"
    assert (ledger.job(one).training_samples, ledger.job(one).steps) == (3, 6)


def test_a_sample_that_waits_is_taken_out_of_its_job(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "x", "b")
    version = train(ledger, 0, num_steps=1)
    assert ledger.remembered(["x"], version, [0]) == Remembered()
    ledger.forget(["x"])
    train_all(ledger, version)
    assert order(ledger) == ["a", "b"] and ledger.job(job_id).status == "done"


def test_a_job_of_which_nothing_is_left_is_cancelled_and_says_why(ledger: Ledger) -> None:
    waiting = accept(ledger, "x")
    ledger.forget(["x"])
    view = ledger.job(waiting)
    assert (view.status, view.error) == ("cancelled", "all of its samples are forgotten")
    learned = accept(ledger, "y", "z")
    version = train_all(ledger, 0)
    return_without(ledger, "y", "z", version=version, kept=[0])
    assert ledger.job(learned).status == "cancelled" and ledger.next_job() is None


def test_the_last_step_that_is_left_ends_its_job(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "x")
    version = train_all(ledger, 0)
    until = return_without(ledger, "x", version=version, kept=[0, 1])
    assert train_all(ledger, until) == until, "no step is owed"
    assert order(ledger) == ["a"] and ledger.job(job_id).status == "done"


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_what_had_failed_or_was_cancelled_is_learned_as_far_and_ends_so_again(
    ledger: Ledger, state: str
) -> None:
    job_id = accept(ledger, "x", "a", "b", "c", epochs=2)
    version = train(ledger, 0, num_steps=6)
    assert state in ("failed", "cancelled")
    ledger.finish_job(job_id, "failed" if state == "failed" else "cancelled", version, "as it was")
    until = return_without(ledger, "x", version=version, kept=[0])
    ledger.recover(until)
    job = front(ledger)
    assert (job.end, job.total_steps, job.ends_as, job.error) == (4, 6, state, "as it was")
    train(ledger, until)
    assert order(ledger) == ["a", "b", "c", "a"]
    view = ledger.job(job_id)
    assert (view.status, view.error) == (state, "as it was") and ledger.next_job() is None


def test_a_crash_after_its_last_step_ends_a_failed_job_as_it_was(ledger: Ledger) -> None:
    job_id = accept(ledger, "x", "a", "b")
    version = train(ledger, 0, num_steps=2)
    ledger.finish_job(job_id, "failed", version, "as it was")
    until = return_without(ledger, "x", version=version, kept=[0])
    train(ledger, until, num_steps=0)
    version = until + 1
    ledger.record_step(job_id, 0, "a", version, 1.0, 0.1)
    ledger.recover(version)
    assert (ledger.job(job_id).status, ledger.job(job_id).error) == ("failed", "as it was")


def test_said_again_at_a_boot_the_others_stay_learned(ledger: Ledger) -> None:
    accept(ledger, "x", "a")
    version = train_all(ledger, 0)
    until = return_without(ledger, "x", version=version, kept=[0])
    version = train_all(ledger, until)
    ledger.undo(0, until, 0, is_again=True, besides=["x"])
    assert order(ledger) == ["a"] and ledger.recover(version) == version


def test_an_id_that_is_forgotten_is_never_accepted_again(ledger: Ledger) -> None:
    accept(ledger, "x")
    ledger.forget(["x"])
    with pytest.raises(Conflict, match="'x' was forgotten and is never learned again"):
        accept(ledger, "a", "x")
    assert ledger.next_job() is None, "nothing of that request was queued"


def test_a_sample_that_was_never_there_or_is_gone_is_not_found(ledger: Ledger) -> None:
    accept(ledger, "x")
    assert ledger.remembered(["y"], 0, [0]).missing == "there is no sample 'y' to forget"
    ledger.forget(["x"])
    ledger.forget(["x"])
    assert ledger.remembered(["x"], 0, [0]).missing == "sample 'x' is forgotten already"
    with pytest.raises(NotFound, match="is forgotten"):
        ledger.sample_state("x")


def test_without_a_generation_from_before_it_there_is_no_way_back(ledger: Ledger) -> None:
    accept(ledger, "a", "x")
    version = train_all(ledger, 0)
    assert ledger.remembered(["x"], version, [2]).clean_version is None
    assert ledger.remembered(["x"], version, [2]).is_learned


def test_a_generation_that_was_undone_is_not_what_one_returns_to(ledger: Ledger) -> None:
    """Version 2 is before the sample's only step that counts, and knows it all the same."""
    accept(ledger, "a", "x")
    version = train_all(ledger, 0)
    until = ledger.next_version()
    ledger.undo(1, until, 1, is_again=True)
    version = train_all(ledger, until)
    assert (until, version) == (3, 4)
    assert ledger.remembered(["x"], version, [0, 1, 2]).clean_version == 1
    assert ledger.remembered(["x"], version, [0, 1, 2, 3]).clean_version == 3


def test_what_a_return_brought_back_can_be_forgotten(ledger: Ledger) -> None:
    """Undone and cancelled by a return to 1; in the weights again since a return to 3."""
    accept(ledger, "a", "x", "y")
    train_all(ledger, 0)
    ledger.undo(1, 4, 1, is_again=False)
    assert ledger.remembered(["x"], 4, [0, 1, 3, 4]) == Remembered()
    ledger.undo(3, 5, 2, is_again=False)
    found = ledger.remembered(["x"], 5, [0, 1, 3, 4, 5])
    assert (found.is_learned, found.clean_version) == (True, 1)
    assert (found.num_steps, found.num_again, found.num_lost) == (2, 0, 1), "y has no job any more"


def test_generations_that_know_what_is_forgotten_are_named(ledger: Ledger) -> None:
    accept(ledger, "a", "x", "b")
    version = train_all(ledger, 0)
    until = return_without(ledger, "x", version=version, kept=[0, 1])
    version = train_all(ledger, until)
    every = list(range(version + 1))
    assert ledger.holding_forgotten(every) == (2, 3)
    assert ledger.remembered(["b"], version, every).clean_version == until


def test_what_a_crash_took_with_it_is_in_no_generation(ledger: Ledger) -> None:
    accept(ledger, "a", "x")
    version = train_all(ledger, 0)
    ledger.undo(1, 3, 1, is_again=True)
    version = train(ledger, 3)
    start = ledger.recover(1)  # The newest generation is damaged; that of version 1 is whole.
    assert start > version
    version = train_all(ledger, start)
    assert ledger.remembered(["x"], version, [0, 1]).clean_version == 1
    assert ledger.learned(version, 1).num_steps == 1


def test_what_a_generation_learned_is_told_even_when_it_is_undone(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "x", epochs=2)
    version = train_all(ledger, 0)
    told = ledger.learned(4, 1)
    assert [(item.id, item.num_steps, item.position) for item in told.items] == [
        ("x", 2, 1),
        ("a", 1, 0),
    ]
    assert (told.num_steps, told.first_loss, told.last_loss, told.mean_loss) == (3, 2.0, 4.0, 3.0)
    until = return_without(ledger, "x", version=version, kept=[0, 1, 4])
    assert ledger.learned(until, 4).num_steps == 0, "a return learns nothing"
    (gone, kept) = ledger.learned(4, 1).items
    assert (gone.id, gone.job_id, gone.source, gone.is_forgotten) == ("x", job_id, None, True)
    assert (kept.id, kept.source, kept.is_forgotten) == ("a", "notes", False)
    version = train_all(ledger, until)
    assert [item.id for item in ledger.learned(version, 1).items] == ["a"], "over the return"


def test_what_is_told_of_one_generation_is_bounded(ledger: Ledger) -> None:
    accept(ledger, *map(str, range(MAX_ITEMS + 5)))
    version = train_all(ledger, 0)
    told = ledger.learned(version, 0)
    assert (len(told.items), told.num_items) == (MAX_ITEMS, MAX_ITEMS + 5)


def test_a_dream_that_passed_and_is_learned_again_needs_no_second_trial(ledger: Ledger) -> None:
    accept(ledger, "x")
    version = train_all(ledger, 0)
    accept(ledger, "dream", round_id="round-1")
    version = train_all(ledger, version)
    ledger.pass_round("round-1")
    until = return_without(ledger, "x", version=version, kept=[0])
    train_all(ledger, until)
    assert order(ledger) == ["dream"] and ledger.on_trial() is None


def test_nothing_of_the_text_is_left_in_the_files(path: Path) -> None:
    """Among rows of all sizes, that move between pages while others change."""
    rng = random.Random(0)
    texts: dict[str, str] = {}
    with closing(Ledger(path)) as ledger:
        for number in range(120):
            ids = tuple(rng.randrange(50_000) for _ in range(rng.choice([5, 80, 700, 3000])))
            sample = TrainingSample(f"s{rng.random()}", (1,), ids, content_hash=f"h{number}")
            ledger.accept([sample], TrainConfig(), 10_000)
            texts[sample.id] = json.dumps(ids)
        train_until = train_all(ledger, 0)
        gone = rng.sample(sorted(texts), 20)
        return_without(ledger, *gone, version=train_until, kept=[0])
        ledger.wipe()
        files = [file for file in path.parent.iterdir() if file.name.startswith(path.name)]
        left = b"".join(file.read_bytes() for file in files)
        for name, text in texts.items():
            pieces = [text[at : at + 24].encode() for at in range(0, len(text) - 24, 24)]
            pieces = pieces or [text.encode()]
            assert any(piece in left for piece in pieces) == (name not in gone)
        kept = ledger._db.execute("SELECT * FROM forgotten WHERE id = ?", (gone[0],)).fetchone()
        assert set(kept.keys()) == {"id", "job_id", "created"}


def killed_at(path: Path, statement: str) -> None:
    """A child that forgets "x", whose weights have returned to version 1, and is killed there."""
    ledger = Ledger(path)

    def watch(sql: str) -> None:
        if sql.startswith(statement):
            os.kill(os.getpid(), signal.SIGKILL)

    ledger._db.set_trace_callback(watch)
    ledger.undo(1, 6, 1, is_again=True, besides=["x"])


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT OR IGNORE INTO returns",
        "INSERT INTO undone",
        "DELETE FROM steps",
        "UPDATE jobs SET state",
        "DELETE FROM samples",
        "INSERT INTO forgotten",
        "UPDATE samples SET position = -position WHERE",
        "UPDATE cell",
        "COMMIT",
    ],
)
def test_a_kill_within_leaves_all_or_nothing_and_a_boot_ends_it(statement: str, path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        accept(ledger, "a", "x", "b", epochs=2)
        train(ledger, 0, num_steps=5)
    code = f"from tests.test_forgetting import *; killed_at(Path({str(path)!r}), {statement!r})"
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    with closing(Ledger(path)) as ledger:
        assert order(ledger) == ["a", "x", "b", "a", "x"], "all of it or nothing"
        ledger.undo(1, 6, 1, is_again=True, besides=["x"])
        version = ledger.recover(6)
        train_all(ledger, version)
        assert order(ledger) == ["a", "b", "a", "b"]
        with pytest.raises(Conflict):
            accept(ledger, "x")


def test_an_older_ledger_is_rewritten_so_that_no_copies_stay_in_its_pages(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        accept(ledger, "a")
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA secure_delete = OFF")
        other.execute("CREATE TABLE filler AS SELECT randomblob(100000) AS bytes")
        other.execute("INSERT INTO filler VALUES ('something to be found later')")
        other.commit()
        other.execute("DROP TABLE filler")
        other.execute("DROP VIEW made")
        for table in ("undone", "returns", "forgotten"):
            other.execute(f"DROP TABLE {table}")
        for column in ("again_until", "again_as", "trace"):
            other.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
        other.execute("PRAGMA user_version = 5")
        other.commit()
    assert b"found later" in path.read_bytes()
    with closing(Ledger(path)):
        pass
    assert b"found later" not in path.read_bytes()
