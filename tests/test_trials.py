"""A dream's job: behind all clients', still while these are answered, on trial until it passes."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.ledger import Ledger
from actors.messages import CellPaths, QueuedJob, TrainingSample
from actors.posted import TrainConfig
from actors.settings import DreamSettings, Settings, TrainerSettings
from actors.traffic import Traffic
from actors.trainer import Trainer
from actors.versions import VersionCounter
from apollo.learning.step import StepReport


def accept(ledger: Ledger, name: str, round_id: str | None = None, num: int = 2) -> str:
    samples = [
        TrainingSample(f"{name}-{at}", (1, 2), (3, 4), content_hash=f"{name}{at}")
        for at in range(num)
    ]
    return ledger.accept(samples, TrainConfig(), 100, round_id).job_id


def front(ledger: Ledger) -> QueuedJob:
    job = ledger.next_job()
    assert job is not None
    return job


def train(ledger: Ledger, job: QueuedJob, version: int, num_steps: int = 2) -> int:
    """Record steps of a job from `version` on; returns the newest version."""
    ledger.start_job(job.job_id, version)
    for index in range(job.steps_done, job.steps_done + num_steps):
        version += 1
        ledger.record_step(job.job_id, index, job.samples[index].id, version, 1.0, 0.1)
    if job.steps_done + num_steps == job.total_steps:
        ledger.finish_job(job.job_id, "done", version)
    return version


def test_a_clients_job_goes_before_an_older_one_of_a_dream(ledger: Ledger) -> None:
    accept(ledger, "dream", "round-1")
    assert not ledger.has_client_jobs()
    taught = accept(ledger, "client")
    assert ledger.has_client_jobs()
    assert front(ledger).job_id == taught
    ledger.cancel(taught)
    assert front(ledger).round_id == "round-1" and not ledger.has_client_jobs()


def test_a_dream_that_gave_way_goes_on_where_it_was(ledger: Ledger) -> None:
    accept(ledger, "dream", "round-1", num=3)
    version = train(ledger, front(ledger), 0, num_steps=1)
    accept(ledger, "client")
    version = train(ledger, front(ledger), version)
    dream = front(ledger)
    assert (dream.round_id, dream.steps_done) == ("round-1", 1)
    assert train(ledger, dream, version) == 5
    assert ledger.job(dream.job_id).status == "done"


def test_a_round_is_on_trial_from_its_first_step_until_it_passes(ledger: Ledger) -> None:
    accept(ledger, "dream", "round-1")
    assert ledger.on_trial() is None
    train(ledger, front(ledger), 0)
    assert ledger.on_trial() == "round-1"
    ledger.pass_round("round-1")
    assert ledger.on_trial() is None


def test_a_clients_job_is_never_on_trial(ledger: Ledger) -> None:
    accept(ledger, "client")
    train(ledger, front(ledger), 0)
    assert ledger.on_trial() is None


def test_what_passed_and_was_lost_is_on_trial_again(ledger: Ledger) -> None:
    """The cell ended between the gate and the commit."""
    accept(ledger, "dream", "round-1")
    train(ledger, front(ledger), 0)
    ledger.pass_round("round-1")
    version = ledger.recover(0)
    assert ledger.on_trial() is None, "none of its steps is in the weights"
    train(ledger, front(ledger), version)
    assert ledger.on_trial() == "round-1"


def test_a_return_ends_the_trial(ledger: Ledger) -> None:
    accept(ledger, "dream", "round-1")
    train(ledger, front(ledger), 0)
    ledger.undo(0, 3, 0, is_again=False)
    assert ledger.on_trial() is None
    assert ledger.jobs(1)[0].status == "cancelled"


class CountingLearner:
    """Learns nothing; counts."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.optimizer = SimpleNamespace(state={}, num_steps=0)

    def use_threads(self, num: int) -> None:
        pass

    def step(self, example: Any, learning_rate: float, **_: Any) -> StepReport:
        self.num_steps += 1
        return StepReport(1.0, {})


@pytest.fixture
def dreaming(tmp_path: Path) -> Iterator[Any]:
    """A trainer, whose traffic the test makes."""
    paths = CellPaths(str(tmp_path), str(tmp_path), str(tmp_path / "ledger.sqlite"))
    VersionCounter.create(paths.versions)
    Traffic.create(paths.traffic)
    settings = Settings(trainer=TrainerSettings(nice=0), dream=DreamSettings(yield_s=0.3))
    trainer = Trainer(settings, paths)
    trainer._ledger = Ledger(paths.ledger)
    learner = CountingLearner()
    trainer._learner = learner  # type: ignore[assignment]
    door = Traffic(paths.traffic, is_writable=True)
    yield SimpleNamespace(trainer=trainer, ledger=trainer._ledger, learner=learner, door=door)
    trainer._stopping.set()


def test_a_dream_makes_no_step_while_clients_are_answered(dreaming: Any) -> None:
    accept(dreaming.ledger, "dream", "round-1")
    dreaming.door.enter()
    running = threading.Thread(target=dreaming.trainer._run, args=(front(dreaming.ledger),))
    running.start()
    time.sleep(0.5)
    assert dreaming.learner.num_steps == 0
    dreaming.door.leave()
    running.join(30)
    assert dreaming.learner.num_steps == 2


def test_a_clients_job_is_trained_while_clients_are_answered(dreaming: Any) -> None:
    accept(dreaming.ledger, "client")
    dreaming.door.enter()
    dreaming.trainer._run(front(dreaming.ledger))
    assert dreaming.learner.num_steps == 2


def test_a_dream_gives_way_to_a_job_that_comes_while_it_waits(dreaming: Any) -> None:
    dream = accept(dreaming.ledger, "dream", "round-1")
    dreaming.door.enter()
    running = threading.Thread(target=dreaming.trainer._run, args=(front(dreaming.ledger),))
    running.start()
    accept(dreaming.ledger, "client")
    running.join(30)
    assert not running.is_alive() and dreaming.learner.num_steps == 0
    assert dreaming.ledger.job(dream).status == "training", "it goes on later"
    assert front(dreaming.ledger).round_id is None


def test_a_dream_that_waits_can_be_cancelled(dreaming: Any) -> None:
    dream = accept(dreaming.ledger, "dream", "round-1")
    dreaming.door.enter()
    running = threading.Thread(target=dreaming.trainer._run, args=(front(dreaming.ledger),))
    running.start()
    while dreaming.ledger.job(dream).status != "training":
        time.sleep(0.01)
    dreaming.ledger.cancel(dream)
    running.join(30)
    assert dreaming.ledger.job(dream).status == "cancelled" and dreaming.learner.num_steps == 0
