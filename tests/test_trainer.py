"""The trainer's thread with a scripted learner: warm-up, rest, and every way a job can end."""

import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import Unavailable
from actors.ledger import Ledger
from actors.messages import CellPaths, JobView, TrainingSample
from actors.posted import TrainConfig
from actors.settings import DreamSettings, Settings, TrainerSettings
from actors.traffic import Traffic
from actors.trainer import Trainer
from actors.versions import VersionCounter
from apollo.learning.step import NonFiniteLoss, StepReport
from apollo.optim.optimizer import TensorReport

LEFT_ALONE = TensorReport(math.inf, 0.0, 1.0, 0.0, is_finite=False)


class ScriptedLearner:
    """Does what the script says at each step, and notes the learning rates."""

    def __init__(self, *script: StepReport | Exception) -> None:
        self.script = list(script)
        self.rates: list[float] = []
        self.threads: list[int] = []
        self.optimizer = SimpleNamespace(state={}, num_steps=0)

    def use_threads(self, num: int) -> None:
        self.threads.append(num)

    def step(
        self, example: Any, learning_rate: float, *, before_writing: Callable[[], None], **_: Any
    ) -> StepReport:
        self.rates.append(learning_rate)
        result = self.script.pop(0) if self.script else StepReport(1.0, {})
        if isinstance(result, NonFiniteLoss):
            raise result
        before_writing()
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    paths = CellPaths(str(tmp_path), str(tmp_path), str(tmp_path / "ledger.sqlite"))
    VersionCounter.create(paths.versions)
    Traffic.create(paths.traffic)
    made = Trainer(Settings(trainer=TrainerSettings(nice=0)), paths)
    made._ledger = Ledger(paths.ledger)
    yield made
    made._ledger.close()


def run(
    trainer: Trainer,
    learner: ScriptedLearner,
    num_samples: int = 1,
    round_id: str | None = None,
    **config: Any,
) -> JobView:
    trainer._learner = learner  # type: ignore[assignment]
    samples = [
        TrainingSample(f"s{at}", (1, 2), (3, 4), content_hash=f"h{at}") for at in range(num_samples)
    ]
    job_id = trainer._ledger.accept(samples, TrainConfig(**config), 100, round_id).job_id
    job = trainer._ledger.next_job()
    assert job is not None
    trainer._run(job)
    return trainer._ledger.job(job_id)


def hold(trainer: Trainer) -> Any:
    """What the checkpoint actor calls; Ray's decorator hides from mypy that it is a method."""
    method: Any = trainer.hold
    return method("token", False)


def test_warm_up_is_linear_and_every_step_is_one_version(trainer: Trainer) -> None:
    learner = ScriptedLearner()
    view = run(trainer, learner, epochs=6, warmup_steps=4, learning_rate=1e-3)
    assert learner.rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert (view.status, view.steps, view.weights_version) == ("done", 6, 6)
    assert trainer._versions.newest_version == 6


def test_epochs_of_the_cache_end_within_a_job_and_with_it(trainer: Trainer) -> None:
    run(trainer, ScriptedLearner(), epochs=17)
    assert trainer._versions.epoch == 3  # After steps 8 and 16, and at the end.


def test_duty_rests_in_proportion_and_ends_when_cancelled(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rested: list[float] = []
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> bool:
        rested.append(seconds)
        now[0] += seconds
        return False

    monkeypatch.setattr(trainer._stopping, "wait", wait)
    trainer._waiting.rest(2.0, 0.25, lambda: False)
    assert sum(rested) == pytest.approx(6.0)
    rested.clear()
    trainer._waiting.rest(2.0, 0.25, lambda: False, 5.0)
    assert sum(rested) == pytest.approx(1.0), "it had rested for 5 s already"
    rested.clear()
    trainer._waiting.rest(2.0, 0.01, lambda: True)
    assert len(rested) == 1


def test_rests_within_a_step_count_as_rest(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, float, float]] = []

    def rest(seconds: float, duty: float, is_over: Any, rested: float) -> None:
        asked.append((seconds, duty, rested))

    now = [0.0]

    def monotonic() -> float:
        now[0] += 50.0  # So long is each step by the clock, of which it stood still for 48.
        return now[0]

    monkeypatch.setattr(trainer._waiting, "rest", rest)
    monkeypatch.setattr("actors.trainer.time", SimpleNamespace(monotonic=monotonic))
    view = run(trainer, ScriptedLearner(StepReport(1.0, {}, rested_s=48.0)), duty=0.25)
    assert asked == [(2.0, 0.25, 48.0)]
    assert view.seconds_per_step == 2.0


def test_whoever_waits_for_a_step_ends_its_rests(trainer: Trainer) -> None:
    is_urgent = trainer._throttle._is_urgent
    with trainer._barrier.step():
        assert not is_urgent()
        holder = threading.Thread(target=trainer._barrier.hold, args=("token", 60))
        holder.start()
        deadline = time.monotonic() + 60
        while not is_urgent() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert is_urgent()
    holder.join(60)
    assert not is_urgent()
    trainer._stopping.set()
    assert is_urgent()


def test_a_loss_that_is_not_finite_fails_the_job_and_makes_no_version(trainer: Trainer) -> None:
    good = StepReport(1.0, {})
    view = run(trainer, ScriptedLearner(good, NonFiniteLoss("the loss is nan")), epochs=3)
    assert view.status == "failed" and "nan" in (view.error or "")
    assert (view.steps, trainer._versions.weights_version) == (1, 1)
    assert trainer._versions.newest_version == 1, "nothing was written"
    assert hold(trainer).weights_version == 1


def test_a_gradient_that_is_not_finite_fails_the_job_and_says_where(trainer: Trainer) -> None:
    view = run(
        trainer, ScriptedLearner(StepReport(1.0, {"model.layers.3.mlp": LEFT_ALONE})), epochs=2
    )
    assert view.status == "failed"
    assert "model.layers.3.mlp" in (view.error or "") and "s0" in (view.error or "")
    assert view.steps == 1, "the tensors that were updated make this a version of its own"


def test_a_step_that_breaks_off_ends_the_job_and_its_weights_are_never_kept(
    trainer: Trainer,
) -> None:
    view = run(trainer, ScriptedLearner(RuntimeError("out of memory")), epochs=2)
    assert view.status == "failed" and "out of memory" in (view.error or "")
    assert trainer._reason is not None and trainer._versions.weights_version == 1
    with pytest.raises(Unavailable, match="out of memory"):
        hold(trainer)


def test_a_broken_step_is_known_before_a_waiting_checkpoint_can_hold(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    enter = trainer._barrier.step

    @contextmanager
    def watched() -> Iterator[None]:
        with enter():
            try:
                yield
            finally:
                seen.append(trainer._spoiled)  # What a holder would find as the barrier opens.

    monkeypatch.setattr(trainer._barrier, "step", watched)
    good = StepReport(1.0, {})
    run(trainer, ScriptedLearner(good, RuntimeError("out of memory")), epochs=2)
    assert seen[0] is None and seen[1] is not None


def test_a_step_that_cannot_be_recorded_is_never_kept(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise sqlite3.DatabaseError("disk image is malformed")

    monkeypatch.setattr(Ledger, "record_step", broken)
    with pytest.raises(sqlite3.DatabaseError):
        run(trainer, ScriptedLearner())
    with pytest.raises(Unavailable, match="malformed"):
        hold(trainer)


def test_a_full_disk_pauses_training_visibly_and_the_step_is_made_once(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Ledger.record_step
    paused: list[str | None] = []

    def full_at_first(ledger: Ledger, *arguments: Any) -> None:
        if len(paused) < 2:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        record(ledger, *arguments)

    def wait(seconds: float) -> bool:
        paused.append(trainer._waiting.reason)
        return False

    monkeypatch.setattr(Ledger, "record_step", full_at_first)
    monkeypatch.setattr(trainer._stopping, "wait", wait)
    learner = ScriptedLearner()
    view = run(trainer, learner)
    assert view.status == "done" and len(learner.rates) == 1
    assert len(paused) == 2 and all("disk is full" in (text or "") for text in paused)
    assert trainer._waiting.reason is None


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_a_job_that_waits_because_nothing_can_be_kept_makes_no_step_and_can_be_cancelled(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        assert len(waits) < 5, "it does not end"
        if len(waits) == 3 and is_cancelled:
            (job,) = trainer._ledger.jobs(1)
            trainer._ledger.cancel(job.job_id)
        elif len(waits) == 3:
            trainer._waiting.nothing_kept = None
        return False

    trainer._waiting.nothing_kept = "the disk is full"
    monkeypatch.setattr(trainer._stopping, "wait", wait)
    learner = ScriptedLearner()
    view = run(trainer, learner, epochs=1, duty=1.0)
    assert (view.status, view.steps) == (("cancelled", 0) if is_cancelled else ("done", 1))
    assert len(learner.rates) == view.steps and len(waits) == 3


def test_a_job_cancelled_before_its_turn_is_left_alone(trainer: Trainer) -> None:
    trainer._learner = ScriptedLearner()  # type: ignore[assignment]
    sample = TrainingSample("s", (1,), (2, 3), content_hash="h")
    job_id = trainer._ledger.accept([sample], TrainConfig(), 100).job_id
    job = trainer._ledger.next_job()
    assert job is not None
    trainer._ledger.cancel(job_id)
    trainer._run(job)
    assert trainer._ledger.job(job_id).steps == 0


def test_a_ledger_is_not_taught_to_a_model_that_was_adopted_anew(trainer: Trainer) -> None:
    trainer._ledger.claim(100.5)
    trainer._ledger.claim(100.5)
    with pytest.raises(Exception, match="adopted anew"):
        trainer._ledger.claim(200.5)


def test_a_return_between_the_last_step_and_the_end_leaves_the_job_to_the_ledger(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resting job is between steps: what a return made of it stays."""

    def return_meanwhile(*arguments: Any) -> None:
        until = trainer._ledger.next_version()
        trainer._ledger.undo(0, until, 0, is_again=False)
        trainer._num_returns += 1

    monkeypatch.setattr(trainer._waiting, "rest", return_meanwhile)
    view = run(trainer, ScriptedLearner())
    assert (view.status, view.steps) == ("cancelled", 0)
    assert trainer._reason is None


def test_a_dream_is_learned_with_the_threads_of_an_idle_machine(trainer: Trainer) -> None:
    changed = DreamSettings(trainer_threads=3, yield_s=0)
    trainer._settings = trainer._settings.model_copy(update={"dream": changed})
    learner = ScriptedLearner()
    run(trainer, learner)
    run(trainer, learner, num_samples=2, round_id="round-1", epochs=2)
    assert learner.threads == [1, 3]
