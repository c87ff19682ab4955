"""A return of the weights: what it undid is cancelled or queued again, once, and never half."""

from actors.ledger import Ledger
from actors.messages import TrainingSample
from actors.posted import TrainConfig


def accept(ledger: Ledger, *names: str, epochs: int = 1) -> str:
    samples = [TrainingSample(name, (1,), (2,), content_hash=name) for name in names]
    return ledger.accept(samples, TrainConfig(epochs=epochs), 100).job_id


def train(ledger: Ledger, version: int, num_steps: int | None = None) -> int:
    """Train the oldest job, or some steps of it; the version afterwards."""
    job = ledger.next_job()
    assert job is not None
    ledger.start_job(job.job_id, version)
    end = job.total_steps if num_steps is None else job.steps_done + num_steps
    for index in range(job.steps_done, end):
        version += 1
        name = job.samples[index % len(job.samples)].id
        ledger.record_step(job.job_id, index, name, version, 1.0, 0.1)
    if end == job.total_steps:
        ledger.finish_job(job.job_id, "done", version)
    return version


def test_what_was_undone_is_cancelled_and_what_was_before_stays(ledger: Ledger) -> None:
    kept, undone, waiting = (accept(ledger, name) for name in "abc")
    assert train(ledger, train(ledger, 0)) == 2
    ledger.undo(1, ledger.next_version(), 7, is_again=False)
    assert ledger.job(kept).status == "done"
    view = ledger.job(undone)
    assert (view.status, view.error) == ("cancelled", "undone by a return to generation 7")
    assert (view.steps, view.weights_version_before, view.weights_version) == (0, 1, None)
    assert ledger.sample_state("b") == ("cancelled", None)
    assert ledger.job(waiting).status == "queued"


def test_what_was_undone_is_queued_again_if_asked(ledger: Ledger) -> None:
    accept(ledger, "a")
    undone = accept(ledger, "b", "c", epochs=2)
    version = train(ledger, train(ledger, 0), num_steps=3)
    after = ledger.next_version()
    assert after == 6, "reserved versions are not used"
    ledger.undo(1, after, 0, is_again=True)
    job = ledger.next_job()
    assert job is not None and (job.job_id, job.steps_done) == (undone, 0)
    assert train(ledger, after) == after + 4 > version
    assert ledger.sample_state("c") == ("trained", after + 4)


def test_a_job_that_is_half_before_keeps_that_half(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "b", "c")
    train(ledger, 0)
    ledger.undo(2, ledger.next_version(), 1, is_again=False)
    view = ledger.job(job_id)
    assert (view.status, view.steps) == ("cancelled", 2)
    assert [ledger.sample_state(name)[0] for name in "abc"] == ["trained", "trained", "cancelled"]


def test_said_again_at_every_boot_it_changes_nothing(ledger: Ledger) -> None:
    """The chain is read at every boot; what was learned since must stay learned."""
    accept(ledger, "a")
    train(ledger, 0)
    until = ledger.next_version()
    ledger.undo(0, until, 0, is_again=False)
    again = accept(ledger, "b")
    train(ledger, until)
    accept(ledger, "c")
    job = ledger.next_job()
    assert job is not None
    ledger.start_job(job.job_id, until + 1)
    ledger.undo(0, until, 0, is_again=False)
    assert ledger.job(again).status == "done"
    assert ledger.job(job.job_id).status == "training"
    assert ledger.recover(until + 1) > until


def test_a_training_job_waits_for_its_turn_after_a_return(ledger: Ledger) -> None:
    job_id = accept(ledger, "a", "b")
    train(ledger, 0, num_steps=1)
    ledger.undo(1, ledger.next_version(), 0, is_again=False)
    assert ledger.job(job_id).status == "queued"
    assert ledger.next_version() == 4
