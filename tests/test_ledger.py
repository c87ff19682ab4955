"""The ledger: what it acknowledged survives a crash, and nothing is trained twice."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors import ledger_rows
from actors.database import BUSY_TIMEOUT_S
from actors.errors import Conflict, NotFound, SettingsError, TooBusy, Unavailable
from actors.ledger import Ledger
from actors.messages import JobState, QueuedJob, TrainingSample
from actors.posted import TrainConfig
from actors.rows import sample_of
from actors.taking_back import MAX_ENDS

MANY = 1000


def sample(name: str, content: str = "") -> TrainingSample:
    return TrainingSample(
        id=name,
        context_ids=(1, 2, 3),
        continuation_ids=(4, 5),
        weight=0.5,
        source="a test",
        content_hash=f"hash of {content or name}",
    )


def accept(ledger: Ledger, *names: str, epochs: int = 1) -> str:
    samples = [sample(name) for name in names]
    return ledger.accept(samples, TrainConfig(epochs=epochs), MANY).job_id


def next_job(ledger: Ledger) -> QueuedJob:
    job = ledger.next_job()
    assert job is not None
    return job


def train(ledger: Ledger, version: int, *, num_steps: int | None = None) -> int:
    """Train the next job from `version`, to its end unless `num_steps` is given."""
    job = next_job(ledger)
    ledger.start_job(job.job_id, version)
    end = job.total_steps if num_steps is None else job.steps_done + num_steps
    for index in range(job.steps_done, end):
        version += 1
        taught = job.samples[index % len(job.samples)]
        ledger.record_step(job.job_id, index, taught.id, version, 1.0 / (index + 1), 0.25)
    if num_steps is None:
        ledger.finish_job(job.job_id, "done", version)
    return version


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


# Opening.


def test_files_are_private_whatever_the_umask_and_were(path: Path) -> None:
    previous = os.umask(0)
    try:
        path.touch(0o666)
        ledger = Ledger(path)
        accept(ledger, "a")
    finally:
        os.umask(previous)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.parent.iterdir()}
    assert modes == dict.fromkeys(
        ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"), 0o600
    )
    ledger.close()


def test_a_commit_reaches_the_disk_before_it_returns(ledger: Ledger) -> None:
    pragma = {
        name: ledger._db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
    }
    assert pragma == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": BUSY_TIMEOUT_S * 1000,
    }


def test_the_ledger_of_an_older_reverie_is_brought_forward_with_its_samples(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        ledger.accept([sample("old")], TrainConfig(), 10)
    with closing(sqlite3.connect(path)) as other:
        for column in ("rejected_ids", "teacher_context_ids"):
            other.execute(f"ALTER TABLE samples DROP COLUMN {column}")
        newer = ("furthest_step", "num_ends", "round_id", "has_passed", "again_until", "again_as")
        for column in (*newer, "trace"):
            other.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
        other.execute("DROP VIEW made")
        for table in ("undone", "returns", "forgotten"):
            other.execute(f"DROP TABLE {table}")
        other.execute("DELETE FROM cell WHERE key = 'undone_until'")
        other.execute("PRAGMA user_version = 1")
        other.commit()
    for _ in range(2):
        with closing(Ledger(path)) as ledger:
            job = ledger.next_job()
            assert job is not None and job.samples == (sample("old"),)
    with closing(Ledger(path)) as ledger:
        new = replace(sample("new"), rejected_ids=(1, 2), teacher_context_ids=(3,))
        ledger.accept([new], TrainConfig(), 10)
        row = ledger._row("SELECT * FROM samples WHERE id = 'new'")
        assert row is not None and sample_of(row) == new


def test_the_ledger_of_a_newer_reverie_is_refused_and_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 8")
    other.close()
    before = path.read_bytes()
    with pytest.raises(SettingsError, match=r"ledger format 8.*knows 7.*newer Reverie"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_closed_ledger_opens_again_with_its_content(path: Path) -> None:
    first = Ledger(path)
    job_id = accept(first, "a", "b", epochs=3)
    first.close()
    second = Ledger(path)
    job = next_job(second)
    assert (job.job_id, job.steps_done, job.total_steps) == (job_id, 0, 6)
    assert job.samples == (sample("a"), sample("b"))
    assert job.config == TrainConfig(epochs=3)
    second.close()


# Accepting.


def test_an_accepted_job_is_seen_by_another_connection_at_once(ledger: Ledger, path: Path) -> None:
    answer = ledger.accept([sample("a"), sample("b")], TrainConfig(), MANY)
    assert answer.status == "queued"
    assert answer.training_samples == 2
    assert answer.duplicates == ()
    assert answer.job_id.startswith("job-") and len(answer.job_id) == len("job-") + 16
    int(answer.job_id.removeprefix("job-"), 16)
    other = Ledger(path)
    assert other.sample_state("a") == ("queued", None)
    assert other.counts() == {"queued": 2, "trained": 0, "failed": 0, "cancelled": 0}
    other.close()


def test_a_kill_9_right_after_the_acknowledgement_loses_nothing(path: Path) -> None:
    script = f"""
import time
from actors.ledger import Ledger
from actors.messages import TrainingSample
from actors.posted import TrainConfig
ledger = Ledger({str(path)!r})
for number in range(10**6):
    name = f"s{{number}}"
    job_id = ledger.accept(
        [TrainingSample(name, (1,), (2,), content_hash=name)], TrainConfig(), 10**7).job_id
    print("accepted", name, flush=True)
    ledger.start_job(job_id, number)
    ledger.record_step(job_id, 0, name, number + 1, 0.5, 0.1)
    print("trained", name, flush=True)
    ledger.finish_job(job_id, "done", number + 1)
"""
    root = Path(__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(25)]
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read()
    child.stdout.close()
    child.wait()
    told = [line.split() for line in [*lines, *rest.splitlines(keepends=True)] if "\n" in line]
    assert len(told) >= 25

    ledger = Ledger(path)
    for what, name in told:
        state, version = ledger.sample_state(name)
        assert state == "trained" or (what, state) == ("accepted", "queued")
        assert version == (int(name[1:]) + 1 if state == "trained" else None)
    assert next(ledger._db.execute("PRAGMA integrity_check"))[0] == "ok"
    ledger.close()


def test_the_same_id_and_content_is_queued_once(ledger: Ledger) -> None:
    first = accept(ledger, "a")
    answer = ledger.accept([sample("a"), sample("b"), sample("b")], TrainConfig(), MANY)
    assert answer.job_id != first
    assert answer.training_samples == 1
    assert answer.duplicates == ("a", "b")
    assert [job.training_samples for job in ledger.jobs(9)] == [1, 1]
    assert ledger.queued_samples() == 2


def test_a_request_of_duplicates_only_is_answered_with_their_job(ledger: Ledger) -> None:
    first = accept(ledger, "a")
    second = accept(ledger, "b")
    train(ledger, 0)
    answer = ledger.accept([sample("a"), sample("b")], TrainConfig(), max_queued=1)
    assert (answer.job_id, answer.status, answer.training_samples) == (first, "done", 0)
    assert answer.duplicates == ("a", "b")
    assert [job.job_id for job in ledger.jobs(9)] == [second, first]


@pytest.mark.parametrize("is_known", [True, False], ids=["in the ledger", "in the same request"])
def test_the_same_id_with_other_content_queues_nothing(ledger: Ledger, is_known: bool) -> None:
    request = [sample("new"), sample("a"), sample("a", "other")]
    if is_known:
        accept(ledger, "a")
        del request[1]
    with pytest.raises(Conflict, match="'a' was used before with other content"):
        ledger.accept(request, TrainConfig(), MANY)
    with pytest.raises(NotFound):
        ledger.sample_state("new")
    assert ledger.queued_samples() == len(ledger.jobs(9)) == int(is_known)


def test_a_request_over_the_bound_queues_nothing_and_names_the_numbers(ledger: Ledger) -> None:
    accept(ledger, "a", "b")
    with pytest.raises(TooBusy, match=r"2 samples are queued and 2 more .* bound of 3"):
        ledger.accept([sample("c"), sample("d")], TrainConfig(), 3)
    assert ledger.queued_samples() == 2
    ledger.accept([sample("a"), sample("c")], TrainConfig(), 3)
    train(ledger, 0)
    ledger.accept([sample("d"), sample("e")], TrainConfig(), 3)
    assert ledger.queued_samples() == 3


def test_a_full_disk_is_said_and_nothing_is_accepted(ledger: Ledger) -> None:
    accept(ledger, "a")
    (num_pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {num_pages}")
    big = replace(sample("big"), context_ids=tuple(range(100_000)))
    with pytest.raises(Unavailable, match=r"disk .* is full and nothing was accepted"):
        ledger.accept([sample("b"), big], TrainConfig(), MANY)
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    assert ledger.queued_samples() == 1
    accept(ledger, "b")


def test_other_failures_of_the_database_are_not_renamed(path: Path) -> None:
    ledger = Ledger(path)
    ledger._db.execute("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        accept(ledger, "a")
    other.execute("ROLLBACK")
    other.close()
    accept(ledger, "a")
    ledger.close()


def test_threads_accept_one_id_once(ledger: Ledger) -> None:
    answers: list[int] = []

    def post() -> None:
        for number in range(20):
            answer = ledger.accept([sample(f"s{number}")], TrainConfig(), MANY)
            answers.append(answer.training_samples)

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 80
    assert sum(answers) == ledger.queued_samples() == len(ledger.jobs(MANY)) == 20


# Training.


def test_jobs_are_trained_in_the_order_of_their_acceptance(ledger: Ledger) -> None:
    assert ledger.next_job() is None
    ids = [accept(ledger, name) for name in "abc"]
    version, trained = 0, []
    while (job := ledger.next_job()) is not None:
        trained.append(job.job_id)
        version = train(ledger, version)
    assert trained == ids


def test_a_job_shows_its_steps_losses_and_versions(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "b", epochs=2)
    fresh = ledger.job(job_id)
    assert (fresh.status, fresh.steps, fresh.total_steps) == ("queued", 0, 4)
    assert fresh.weights_version_before is fresh.weights_version is fresh.seconds_per_step is None
    ledger.start_job(job_id, 10)
    for index, seconds in enumerate([0.1, 0.9, 0.2]):
        ledger.record_step(job_id, index, "ab"[index % 2], 11 + index, float(index), seconds)
    view = ledger.job(job_id)
    assert view.status == "training"
    assert (view.training_samples, view.steps, view.total_steps) == (2, 3, 4)
    assert view.loss_history == (0.0, 1.0, 2.0)
    assert (view.weights_version_before, view.weights_version) == (10, 13)
    assert view.seconds_per_step == 0.2
    assert view.config == TrainConfig(epochs=2).model_dump()
    assert ledger.sample_state("a") == ("trained", 13)
    assert ledger.sample_state("b") == ("queued", None)
    ledger.record_step(job_id, 3, "b", 14, 3.0, 0.1)
    ledger.finish_job(job_id, "done", 14)
    assert ledger.job(job_id).status == "done"
    assert ledger.sample_state("b") == ("trained", 14)


def test_the_loss_history_keeps_the_newest(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_rows, "MAX_LOSS_HISTORY", 3)
    job_id = accept(ledger, "a", epochs=5)
    train(ledger, 0)
    view = ledger.job(job_id)
    assert view.steps == 5
    assert view.loss_history == (1 / 3, 1 / 4, 1 / 5)


def test_a_step_that_is_recorded_already_raises(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", epochs=3)
    train(ledger, 0, num_steps=1)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.record_step(job_id, 0, "a", 2, 0.5, 0.1)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.record_step(job_id, 1, "a", 1, 0.5, 0.1)
    assert ledger.job(job_id).steps == 1


@pytest.mark.parametrize(
    ("index", "name", "version"),
    [(2, "a", 2), (1, "a", 2), (1, "other", 2), (1, "b", 99), (1, "b", 0)],
    ids=["a gap", "another's turn", "another job's sample", "not reserved", "a past version"],
)
def test_a_step_that_cannot_be_asserts_and_leaves_nothing(
    ledger: Ledger, index: int, name: str, version: int
) -> None:
    job_id = accept(ledger, "a", "b", epochs=2)
    accept(ledger, "other")
    train(ledger, 0, num_steps=1)
    with pytest.raises(AssertionError):
        ledger.record_step(job_id, index, name, version, 0.5, 0.1)
    assert ledger.job(job_id).steps == 1


def test_a_step_without_a_loss_or_of_no_training_job_raises(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", epochs=2)
    with pytest.raises(AssertionError, match="is queued, not training"):
        ledger.record_step(job_id, 0, "a", 1, 0.5, 0.1)
    ledger.start_job(job_id, 0)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.record_step(job_id, 0, "a", 1, float("nan"), 0.1)
    for index in range(2):
        ledger.record_step(job_id, index, "a", 1 + index, 0.5, 0.1)
    ledger.settle(5)
    with pytest.raises(AssertionError):
        ledger.record_step(job_id, 2, "a", 3, 0.5, 0.1)


def test_a_job_is_not_done_before_all_is_trained(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "b")
    train(ledger, 0, num_steps=1)
    with pytest.raises(AssertionError, match="1 samples untrained"):
        ledger.finish_job(job_id, "done", 1)
    assert ledger.job(job_id).status == "training"
    with pytest.raises(AssertionError, match="in the past"):
        ledger.finish_job(job_id, "failed", 0)


def test_a_failed_job_says_why_and_keeps_what_it_trained(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "b")
    train(ledger, 0, num_steps=1)
    ledger.finish_job(job_id, "failed", 1, "step 2: the loss is not finite")
    view = ledger.job(job_id)
    assert (view.status, view.error) == ("failed", "step 2: the loss is not finite")
    assert ledger.counts() == {"queued": 0, "trained": 1, "failed": 1, "cancelled": 0}
    assert ledger.next_job() is None
    with pytest.raises(Conflict, match="is failed already"):
        ledger.finish_job(job_id, "done", 1)


# Cancelling and looking.


def test_a_queued_job_is_cancelled_at_once(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "b")
    assert ledger.cancel(job_id).status == "cancelled"
    assert ledger.counts()["cancelled"] == 2
    assert ledger.queued_samples() == 0
    assert ledger.next_job() is None
    with pytest.raises(Conflict, match="is cancelled already"):
        ledger.start_job(job_id, 0)


def test_a_training_job_is_asked_to_end(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "b")
    train(ledger, 0, num_steps=1)
    assert not ledger.is_cancel_requested(job_id)
    assert ledger.cancel(job_id).status == "training"
    assert ledger.cancel(job_id).status == "training"
    assert ledger.is_cancel_requested(job_id)
    ledger.finish_job(job_id, "cancelled", 1)
    assert ledger.job(job_id).status == "cancelled"
    assert ledger.counts() == {"queued": 0, "trained": 1, "failed": 0, "cancelled": 1}


def test_a_job_at_its_end_cannot_be_cancelled(ledger: Ledger) -> None:
    job_id = accept(ledger, "a")
    train(ledger, 0)
    with pytest.raises(Conflict, match="is done already"):
        ledger.cancel(job_id)


def test_what_is_unknown_is_not_found(ledger: Ledger) -> None:
    with pytest.raises(NotFound, match="job-nowhere"):
        ledger.job("job-nowhere")
    with pytest.raises(NotFound):
        ledger.cancel("job-nowhere")
    with pytest.raises(NotFound, match="'a'"):
        ledger.sample_state("a")


def test_jobs_are_listed_newest_first_by_state(ledger: Ledger) -> None:
    ids = [accept(ledger, name) for name in "abc"]
    train(ledger, 0)
    assert [job.job_id for job in ledger.jobs(2)] == [ids[2], ids[1]]
    assert [job.job_id for job in ledger.jobs(9, "queued")] == [ids[2], ids[1]]
    assert [job.job_id for job in ledger.jobs(9, "done")] == [ids[0]]


# Recovering: a crash loses the weights after the public version, and the steps with them.


def test_nothing_is_lost_where_nothing_newer_was_announced(ledger: Ledger) -> None:
    assert ledger.recover(0) == 0
    job_id = accept(ledger, "a", "b")
    assert train(ledger, 0) == 2
    assert ledger.recover(2) == 2
    assert ledger.recover(7) == 7, "public weights that are newer than the ledger"
    assert ledger.job(job_id).status == "done"


def test_a_done_job_that_the_weights_forgot_is_queued_again(ledger: Ledger) -> None:
    kept, lost = accept(ledger, "a"), accept(ledger, "b", "c")
    assert train(ledger, train(ledger, 0)) == 3
    assert ledger.recover(1) == 4
    assert ledger.recover(1) == 4
    assert ledger.job(kept).status == "done"
    view = ledger.job(lost)
    assert (view.status, view.steps, view.loss_history) == ("queued", 0, ())
    assert view.weights_version_before is view.weights_version is None
    assert ledger.sample_state("a") == ("trained", 1)
    assert ledger.sample_state("c") == ("queued", None)
    assert next_job(ledger).job_id == lost
    assert train(ledger, 4) == 6
    assert ledger.job(lost).weights_version_before == 4
    assert ledger.sample_state("c") == ("trained", 6)


@pytest.mark.parametrize("is_done", [True, False], ids=["done", "training"])
def test_a_job_resumes_at_the_steps_that_survived(ledger: Ledger, is_done: bool) -> None:
    job_id = accept(ledger, "a", "b", "c", epochs=2)
    train(ledger, 0, num_steps=None if is_done else 5)
    assert ledger.recover(4) == 7, "versions 5 and 6 had been reserved, and may have been announced"
    view = ledger.job(job_id)
    assert (view.status, view.steps, view.weights_version) == ("queued", 4, 4)
    assert view.weights_version_before == 0
    assert [ledger.sample_state(name)[0] for name in "abc"] == ["trained", "queued", "queued"]
    assert next_job(ledger).steps_done == 4
    assert train(ledger, 7) == 9
    assert [ledger.sample_state(name) for name in "abc"] == [
        ("trained", 4),
        ("trained", 8),
        ("trained", 9),
    ]
    assert ledger.recover(9) == 9


def test_a_version_announced_but_not_recorded_is_never_used_again(ledger: Ledger) -> None:
    accept(ledger, "a", epochs=5)
    train(ledger, 10, num_steps=2)
    # Step 3 made version 13, an answer reported it, and the crash came before record_step.
    assert ledger.recover(10) == 16
    ledger.start_job(next_job(ledger).job_id, 16)
    assert ledger.recover(10) == 22, "the reload's own versions are reserved too"


def test_a_crash_between_the_last_step_and_the_finish_ends_the_job(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", epochs=3)
    train(ledger, 0, num_steps=3)
    assert ledger.recover(3) == 3
    view = ledger.job(job_id)
    assert (view.status, view.weights_version) == ("done", 3)
    assert ledger.next_job() is None


@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_job_that_never_gets_past_a_step_is_given_up_and_frees_the_queue(
    ledger: Ledger, num_steps: int
) -> None:
    poison, next_one = accept(ledger, "a", epochs=5), accept(ledger, "b")
    version = 0
    for number in range(MAX_ENDS):
        assert next_job(ledger).job_id == poison, f"given up after {number} ends of the cell"
        train(ledger, version, num_steps=num_steps)
        version = ledger.recover(0)  # Nothing of it was published: its steps are made again.
    view = ledger.job(poison)
    assert view.status == "failed" and f"step {num_steps + 1} of this job" in (view.error or "")
    assert ledger.sample_state("a")[0] == "failed"
    assert next_job(ledger).job_id == next_one


def test_a_job_that_gets_further_each_time_is_never_given_up(ledger: Ledger) -> None:
    job_id, version = accept(ledger, "a", epochs=3 * MAX_ENDS), 0
    for number in range(2 * MAX_ENDS):
        version = train(ledger, version, num_steps=1)
        version = ledger.recover(version)
        view = ledger.job(job_id)
        assert (view.status, view.steps) == ("queued", number + 1)


def test_a_job_asked_to_end_does_not_resume_after_a_crash(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "b", "c")
    train(ledger, 0, num_steps=2)
    ledger.cancel(job_id)
    ledger.recover(1)
    view = ledger.job(job_id)
    assert (view.status, view.steps, view.weights_version) == ("cancelled", 1, 1)
    assert [ledger.sample_state(name)[0] for name in "abc"] == ["trained", "cancelled", "cancelled"]
    assert ledger.next_job() is None


def test_a_cancellation_that_came_too_late_is_not_remembered(ledger: Ledger) -> None:
    job_id = accept(ledger, "a")
    train(ledger, 0, num_steps=1)
    ledger.cancel(job_id)
    ledger.finish_job(job_id, "done", 1)
    ledger.recover(0)
    assert not ledger.is_cancel_requested(job_id)
    assert next_job(ledger).job_id == job_id


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_job_at_a_bad_end_stays_there_without_the_lost_steps(
    ledger: Ledger, state: JobState
) -> None:
    job_id = accept(ledger, "a", "b", "c")
    train(ledger, 0, num_steps=2)
    assert state == "failed" or state == "cancelled"
    ledger.finish_job(job_id, state, 3, "why")
    assert ledger.recover(1) == 4
    view = ledger.job(job_id)
    assert (view.status, view.error, view.steps, view.weights_version) == (state, "why", 1, 1)
    assert ledger.sample_state("a") == ("trained", 1)
    assert ledger.sample_state("b") == (state, None)
    assert ledger.sample_state("c") == (state, None)
    assert ledger.next_job() is None


def test_a_clean_stop_in_the_middle_of_a_job_goes_on_under_the_same_version(path: Path) -> None:
    ledger = Ledger(path)
    job_id = accept(ledger, "a", "b")
    assert train(ledger, 0, num_steps=1) == 1
    ledger.settle(1)
    ledger.close()
    ledger = Ledger(path)
    assert ledger.recover(1) == 1
    assert next_job(ledger).steps_done == 1
    assert train(ledger, 1) == 2
    assert ledger.job(job_id).weights_version_before == 0
    ledger.close()


# Any order of events. The weights are modelled by what was learned into them, in order.

Learned = tuple[tuple[str, int], ...]


class Cell(RuleBasedStateMachine):
    """A trainer, its checkpoints and its crashes, over a real ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.dir = tempfile.mkdtemp(prefix="test-ledger-")
        self.ledger = Ledger(f"{self.dir}/ledger.sqlite")
        self.names: dict[int, Learned] = {}
        self.accepted: dict[str, str] = {}
        self.version, self.learned = self.ledger.recover(0), ()
        self.public: tuple[int, Learned] = (0, ())
        self.training: QueuedJob | None = None
        self.announce()

    learned: Learned

    def announce(self) -> None:
        known = self.names.setdefault(self.version, self.learned)
        assert known == self.learned, f"version {self.version} names two states"

    def learn(self, job_id: str, index: int) -> None:
        self.learned = (*self.learned, (job_id, index))
        self.version += 1
        self.announce()

    @rule(num=st.integers(1, 3), epochs=st.integers(1, 3))
    def accept(self, num: int, epochs: int) -> None:
        names = [f"s{len(self.accepted) + i}" for i in range(num)]
        job_id = accept(self.ledger, *names, epochs=epochs)
        self.accepted.update(dict.fromkeys(names, job_id))

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def accept_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.accepted)))
        answer = self.ledger.accept([sample(name)], TrainConfig(), MANY)
        assert (answer.job_id, answer.training_samples) == (self.accepted[name], 0)

    @precondition(lambda self: self.training is None)
    @rule()
    def start(self) -> None:
        self.training = self.ledger.next_job()
        if self.training is not None:
            self.ledger.start_job(self.training.job_id, self.version)

    @precondition(lambda self: self.training is not None)
    @rule(num=st.integers(1, 4), is_finished=st.booleans())
    def step(self, num: int, is_finished: bool) -> None:
        job = self.training
        assert job is not None
        done = self.ledger.job(job.job_id).steps
        for index in range(done, min(done + num, job.total_steps)):
            self.learn(job.job_id, index)
            taught = job.samples[index % len(job.samples)]
            self.ledger.record_step(job.job_id, index, taught.id, self.version, 1.0, 0.1)
        if is_finished and done + num >= job.total_steps:
            self.ledger.finish_job(job.job_id, "done", self.version)
            self.training = None

    @precondition(lambda self: self.training is not None)
    @rule(is_partial=st.booleans())
    def fail(self, is_partial: bool) -> None:
        job = self.training
        assert job is not None
        if is_partial and self.ledger.job(job.job_id).steps < job.total_steps:
            self.learn(job.job_id, -1)  # some tensors were updated, and the step is not recorded
        self.ledger.finish_job(job.job_id, "failed", self.version, "why")
        self.training = None

    @precondition(lambda self: self.ledger.jobs(1, "queued") or self.training)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        jobs = self.ledger.jobs(MANY, "queued") + self.ledger.jobs(MANY, "training")
        view = self.ledger.cancel(data.draw(st.sampled_from(jobs)).job_id)
        assert view.status in ("cancelled", "training")

    @precondition(lambda self: self.training is not None)
    @rule()
    def obey(self) -> None:
        job = self.training
        assert job is not None
        if self.ledger.is_cancel_requested(job.job_id):
            self.ledger.finish_job(job.job_id, "cancelled", self.version)
            self.training = None

    @rule()
    def checkpoint(self) -> None:
        self.public = (self.version, self.learned)

    @rule()
    def stop(self) -> None:
        self.ledger.settle(self.version)
        self.checkpoint()
        self.boot()
        assert self.version == self.public[0], "a clean stop loses no version"

    @rule(is_step_unrecorded=st.booleans())
    def crash(self, is_step_unrecorded: bool) -> None:
        job = self.training
        if is_step_unrecorded and job is not None:
            done = self.ledger.job(job.job_id).steps
            if done < job.total_steps:
                self.learn(job.job_id, done)
        self.boot()

    def boot(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(f"{self.dir}/ledger.sqlite")
        self.training = None
        public_version, self.learned = self.public
        self.version = self.ledger.recover(public_version)
        assert self.version == self.ledger.recover(public_version)
        self.announce()

    @invariant()
    def the_weights_hold_each_step_once(self) -> None:
        assert len(set(self.learned)) == len(self.learned)
        recorded = self.ledger._db.execute("SELECT job_id, step_index FROM steps ORDER BY version")
        assert [tuple(row) for row in recorded] == [step for step in self.learned if step[1] >= 0]

    @invariant()
    def every_sample_is_trained_or_accounted_for(self) -> None:
        learned = [name for name, _ in self.samples_learned()]
        for name, job_id in self.accepted.items():
            view = self.ledger.job(job_id)
            state, _ = self.ledger.sample_state(name)
            times = learned.count(name)
            epochs = view.config["epochs"]
            assert (state == "trained") == (times == epochs) and times <= epochs
            assert state == "trained" or state == view.status or view.status == "training"
            assert state in ("trained", "queued") or view.status in ("failed", "cancelled")
        assert sum(self.ledger.counts().values()) == len(self.accepted)

    def samples_learned(self) -> Iterator[tuple[str, int]]:
        for job_id, index in self.learned:
            names = [name for name, owner in self.accepted.items() if owner == job_id]
            if index >= 0:
                yield names[index % len(names)], index

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.dir)


TestAnyOrder = Cell.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
