"""Owns the module over the live weights, the optimizer, and the front of the job queue.

    POST /train --> submit: tokenise, check, ledger (durable) --> 202
                                      |
    training thread: next job --> step under the barrier --> version + 1 --> ledger --> sleep (duty)
                                    rests in it while anybody is answered (throttle)

One thread trains; control methods (`control` group) answer beside it. The ledger is the truth about
what is queued and trained; the thread keeps nothing that a restart would miss.
"""

import os
import sqlite3
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final

import ray

from actors import logs
from actors.calls import in_words
from actors.desk import Desk
from actors.encoding import Encoder, size_check
from actors.errors import Conflict, Unavailable
from actors.events import Events
from actors.job_log import JobLog
from actors.ledger import Ledger
from actors.messages import (
    CellPaths,
    EndState,
    Hold,
    QueuedJob,
    Return,
    TrainerReport,
)
from actors.pausing import paused_engine
from actors.progress import Progress
from actors.recall import begin_from_public, recall, write_optimizer
from actors.settings import Settings
from actors.teacher import ask_teacher
from actors.throttle import Throttle
from actors.traffic import Traffic
from actors.versions import VersionCounter
from actors.waiting import Waiting

if TYPE_CHECKING:
    from apollo.learning.anchor import Anchor
    from apollo.learning.samples import TopLogprobs
    from apollo.learning.step import Learner

IDLE_WAIT_S: Final = 1
STOP_TIMEOUT_S: Final = 60


class _Returned(Exception):
    """The weights have returned to an earlier generation; this job's steps may be undone."""


class StepFailed(Exception):
    """A step left something unlearned; the job ends as failed with this message."""


class Trainer(Desk):
    """Teaches the served weights, one sample a step."""

    def __init__(self, settings: Settings, paths: CellPaths) -> None:
        os.environ["OMP_NUM_THREADS"] = str(settings.trainer.threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.nice(settings.trainer.nice)
        self._settings = settings
        self._paths = paths
        self._versions = VersionCounter(paths.versions, is_writable=True)
        logs.configure(settings.logs, "trainer", lambda: self._versions.weights_version)
        self._events = Events(Path(paths.ledger).parent, "trainer")
        self._job_log = JobLog(self._events)
        super().__init__()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._learner: Learner
        self._anchor: Anchor | None = None
        """This job's hold on what the model was when it began, or began again."""
        self._teachings: dict[str, TopLogprobs] = {}
        """What the teacher said of this job's samples, when each was first trained."""
        self._num_tensors = self._weights_bytes = 0
        self._progress = Progress()
        self._traffic = Traffic(paths.traffic)
        self._throttle = Throttle(
            settings.trainer.latency_budget_ms,
            settings.trainer.min_duty,
            self._traffic,
            lambda: self._barrier.is_awaited or self._stopping.is_set(),
        )
        self._waiting = Waiting(self._stopping)
        self._reason: str | None = None
        self._spoiled: str | None = None
        """Why the live weights may hold half a step, or one that the ledger does not know."""

    def __repr__(self) -> str:
        return f"trainer of {self._paths.model}"

    @ray.method
    def start(self, has_stale_weights: bool = False) -> TrainerReport:
        """Attach to the live weights, reconcile the ledger with them, and begin to train.

        Weights that an earlier trainer of the same engine may have left in the middle of a step are
        stale: they become the public ones first, in place, while the engine reads.
        """
        from transformers import AutoTokenizer

        from apollo.learning.noting import note_changes
        from apollo.learning.step import Learner
        from apollo.weights.attach import attach
        from apollo.weights.layout import WeightLayout

        model_dir = Path(self._paths.model_dir)
        layout = WeightLayout.load(Path(self._paths.layout))
        self._num_tensors, self._weights_bytes = len(layout), layout.size_bytes
        module = attach(layout, model_dir)
        trainer = self._settings.trainer
        self._learner = Learner(
            module,
            rank=trainer.rank,
            update_proj_gap=trainer.update_proj_gap,
            betas=(trainer.beta1, trainer.beta2),
            weight_decay=trainer.weight_decay,
            clip=trainer.clip,
            rounding=trainer.rounding,
            kernels=trainer.kernels,
            checkpoint_layers=trainer.checkpoint_layers,
            seed=trainer.seed,
            train_embeddings=trainer.train_embeddings,
            # An engine that stands still during a step answers nobody who could be given way.
            breathe=(lambda: 0.0) if trainer.pause_engine else self._throttle.breathe,
        )
        max_len = self._settings.engine.max_model_len
        self._encoder = Encoder(
            tokenizer=AutoTokenizer.from_pretrained(model_dir, local_files_only=True),
            vocab_size=self._learner.module.config.get_text_config().vocab_size,
            check_size=size_check(self._learner.estimate, trainer),
            max_len=min(max_len, getattr(module.config, "max_position_embeddings", max_len)),
        )
        self._ledger, optimizer = Ledger(Path(self._paths.ledger)), self._learner.optimizer
        generation = begin_from_public(
            self._settings.home,
            self._paths,
            optimizer,
            self._ledger,
            self._versions,
            has_stale_weights=has_stale_weights,
        )
        if self._settings.journal.moves == "changed":
            note_changes(self._learner, layout, Path(self._paths.changed), generation)
        self._thread.start()
        return self._describe()

    # Control: answered while a step runs.

    @ray.method(concurrency_group="report")
    def report(self) -> TrainerReport:
        """What the trainer is doing."""
        return self._describe()

    def _describe(self) -> TrainerReport:
        is_alive = self._thread.is_alive() or self._stopping.is_set()
        return TrainerReport(
            pid=os.getpid(),
            weights_version=self._versions.weights_version,
            num_tensors=self._num_tensors,
            weights_bytes=self._weights_bytes,
            state_bytes=self._learner.optimizer.size_bytes(),
            queued_samples=self._ledger.queued_samples(),
            samples=self._ledger.counts(),
            **self._progress.as_fields(),
            duty=self._throttle.duty,
            on_trial=self._ledger.on_trial(),
            paused=self._waiting.reason,
            reason=self._reason or (None if is_alive else "the training thread ended"),
        )

    @ray.method(concurrency_group="control")
    def hold(self, token: str, with_optimizer: bool) -> Hold:
        """Stand between two steps until `release`; writes the optimizer's state if asked.

        Raises Unavailable if a step does not end, or if these weights must not be kept.
        """
        if self._waiting.is_ledger_full:
            raise Unavailable(f"training is paused: {self._waiting.reason}")
        if not self._barrier.hold(token, self._settings.trainer.step_timeout_s):
            raise Unavailable("the step in progress did not end in time; try again later")
        try:
            if self._spoiled is not None:
                raise Unavailable(f"{self._spoiled}; the cell restarts from the last generation")
            version, optimizer = self._versions.weights_version, self._learner.optimizer
            on_trial = self._ledger.on_trial()
            is_written = with_optimizer and bool(optimizer.state) and on_trial is None
            if is_written:
                write_optimizer(optimizer, Path(self._paths.optimizer))
            unused = max(self._ledger.next_version(), version + 1)
            return Hold(token, version, unused, is_written, optimizer.num_steps, on_trial)
        except Exception as error:
            self._barrier.release(token)
            raise Unavailable(f"the trainer cannot be held: {in_words(error)}") from None

    @ray.method(concurrency_group="control")
    def restore(self, made: Return) -> None:
        """Take over the weights of a return, which are public, under the hold that it names."""
        from apollo.journal.live import restore

        if not self._barrier.is_held(made.token):
            raise Unavailable("the hold has ended; the cell restarts from what was returned to")
        self._spoiled = "a return broke off"
        self._num_returns += 1
        self._versions.begin_writing(made.weights_version)
        restore(Path(self._paths.layout), model_dir := Path(self._paths.model_dir))
        recall(self._settings.home, model_dir.name, self._learner.optimizer, self._ledger)
        self._versions.weights_version = made.weights_version
        self._versions.next_epoch()
        self._spoiled = None

    @ray.method(concurrency_group="control")
    def wait_for_room(self, why: str | None) -> None:
        """Make no step while nothing that is learned could be kept; None: go on."""
        self._waiting.nothing_kept = why

    @ray.method(concurrency_group="control")
    def release(self, token: str) -> bool:
        """End a hold; False if it was not in force any more."""
        return self._barrier.release(token)

    @ray.method(concurrency_group="control")
    def pause(self) -> int:
        """Finish the step in progress and take no further one; returns the final version."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(STOP_TIMEOUT_S)
        version = self._versions.weights_version
        if not self._thread.is_alive() and self._spoiled is None:
            self._ledger.settle(version)
        return version

    # The training thread.

    def _train(self) -> None:
        try:
            while not self._stopping.is_set():
                self._wake.clear()
                num_returns = self._num_returns
                job = self._ledger.next_job()
                if job is None:
                    self._wake.wait(IDLE_WAIT_S)
                    continue
                self._run(job, num_returns)
        except Exception as error:  # The cell restarts on `reason`; the ledger knows what is left.
            self._reason = f"training stopped: {type(error).__name__}: {error}"

    def _run(self, job: QueuedJob, num_returns: int = 0) -> None:
        """Train one job to its end, its failure, its cancellation, or the trainer's stop."""
        from apollo.learning.anchor import Anchor
        from apollo.learning.step import NonFiniteLoss, StepTooLong

        try:
            version = self._versions.weights_version
            self._waiting.for_room(lambda: self._ledger.start_job(job.job_id, version))
        except Conflict:
            return  # It was cancelled just before.
        self._progress.job_id, self._progress.steps = job.job_id, job.steps_done
        self._job_log.begin(job, version)
        self._learner.use_threads(
            self._settings.trainer.threads
            if job.round_id is None
            else self._settings.dream.trainer_threads
        )
        self._teachings.clear()
        self._throttle.begin()
        self._anchor = None
        if (strength := job.config.anchor) > 0:
            self._anchor = Anchor(self._learner.module, self._encoder.tokenizer, strength)
        state: EndState = job.ends_as
        error = job.error

        def is_cancelled() -> bool:
            return self._ledger.is_cancel_requested(job.job_id)

        try:
            for index in range(job.steps_done, job.end):
                self._waiting.until_kept(is_cancelled)
                if self._gives_way(job) or self._stopping.is_set():
                    return
                if is_cancelled():
                    state = "cancelled"
                    break
                self._step(job, index, num_returns)
        except _Returned:
            return  # The ledger knows what became of the job.
        except (StepFailed, NonFiniteLoss, StepTooLong, Unavailable) as failure:
            state, error = "failed", str(failure)
        except sqlite3.Error as failure:
            # The step is made but not recorded: the cell restarts without it and makes it again.
            self._spoiled = f"a step could not be recorded: {failure}"
            raise
        except Exception as failure:
            # Half a step may be in the weights: the cell restarts without it, and without this job.
            state, error = "failed", f"a step broke off: {type(failure).__name__}: {failure}"
            self._spoiled = error
            self._versions.weights_version += 1  # Of those reserved: it is another state now.
            self._stopping.set()
        finally:
            self._progress.job_id = None
            self._job_log.tell()
        with self._barrier.step():
            if self._num_returns != num_returns:
                return
            # Before anybody reads `done`: the next request must not see the old epoch's prefixes.
            self._versions.next_epoch()
            end = (job.job_id, state, self._versions.weights_version, error)
            self._waiting.for_room(lambda: self._ledger.finish_job(*end))
        self._job_log.end(state, self._versions.weights_version)
        self._reason = self._spoiled  # Only now: the cell restarts on it.

    def _step(self, job: QueuedJob, index: int, num_returns: int) -> None:
        from apollo.learning.samples import Example
        from apollo.learning.step import NonFiniteLoss, StepTooLong

        sample, config = job.samples[index % len(job.samples)], job.config
        if config.objective == "distill" and sample.id not in self._teachings:
            model = Path(self._paths.model_dir).name
            self._teachings[sample.id] = ask_teacher(self._paths.socket, model, sample)
        example = Example(
            sample.context_ids,
            sample.continuation_ids,
            sample.weight,
            sample.rejected_ids,
            self._teachings.get(sample.id),
        )
        warm_up = min(1.0, (index + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        with self._barrier.step(), self._quiet(), self._versions.step():
            if self._num_returns != num_returns:
                raise _Returned
            begun = time.monotonic()
            self._throttle.resume()
            # Said before the barrier opens: a checkpoint that waits must not keep a broken step.
            self._spoiled = "a step broke off"
            try:
                report = self._learner.step(
                    example,
                    config.learning_rate * warm_up,
                    objective=config.objective,
                    grad_context=config.grad_context,
                    anchor=self._anchor.at(index) if self._anchor else None,
                    deadline_s=self._settings.trainer.step_deadline_s,
                    before_writing=self._versions.begin_writing,
                )
            except (NonFiniteLoss, StepTooLong):
                self._spoiled = None  # Nothing was changed.
                raise
            seconds = time.monotonic() - begun - report.rested_s
            self._versions.weights_version += 1
            version = self._versions.weights_version
            if (index + 1) % self._settings.trainer.epoch_steps == 0:
                self._versions.next_epoch()
            step = (job.job_id, index, sample.id, version, report.loss, seconds)
            self._waiting.for_room(lambda: self._ledger.record_step(*step))
            self._spoiled = None
        tokens = len(sample.continuation_ids) + len(sample.rejected_ids)
        self._progress.note(index + 1, report, seconds, tokens)
        self._job_log.step(index + 1, version, report.loss, seconds, tokens)
        if report.skipped:
            raise StepFailed(
                f"step {index + 1}, sample {sample.id}: the gradient of {report.skipped[0]} is not "
                f"finite ({len(report.skipped)} tensors were left alone); lower learning_rate"
            )
        self._waiting.rest(
            seconds,
            config.duty or self._settings.trainer.duty,
            lambda: self._ledger.is_cancel_requested(job.job_id),
            report.rested_s,
        )

    def _gives_way(self, job: QueuedJob) -> bool:
        """Whether a dream's job must let a client's go first; blocks while clients are answered."""
        if job.round_id is None:
            return False
        has_clients = self._ledger.has_client_jobs
        self._waiting.until(
            lambda: (
                self._traffic.idle_s() >= self._settings.dream.yield_s
                or has_clients()
                or self._ledger.is_cancel_requested(job.job_id)
            )
        )
        return has_clients()

    def _quiet(self) -> AbstractContextManager[None]:
        trainer = self._settings.trainer
        return paused_engine(trainer.step_deadline_s) if trainer.pause_engine else nullcontext()
