"""What the trainer answers from the ledger, beside its training thread: jobs, and forgetting.

ingress     --submit, job, jobs, cancel--------------+
dream       --submit, pass_round, job, cancel--------+--> ledger --> the training thread
checkpoint  --remembered, remove, learned, holding---+
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from actors.barrier import StepBarrier
from actors.encoding import Encoder
from actors.errors import Unavailable
from actors.events import Events
from actors.ledger import Ledger
from actors.logs import bound
from actors.messages import Acceptance, JobView
from actors.past import Learned, Remembered, Removal
from actors.posted import TrainRequest
from actors.settings import Settings
from actors.versions import VersionCounter


class Desk:
    """Knows no tensors; every method is short, and answered while a step runs."""

    _settings: Settings
    _versions: VersionCounter
    _encoder: Encoder
    _ledger: Ledger
    _events: Events

    def __init__(self) -> None:
        self._barrier = StepBarrier()
        self._wake = threading.Event()
        self._num_returns = 0
        """Goes up with whatever the training thread must look into the ledger for again."""

    @ray.method(concurrency_group="control")
    def submit(
        self, request: TrainRequest, round_id: str | None = None, trace: str | None = None
    ) -> Acceptance:
        """Queue all samples of a request, durably, or none; a ReverieError says why not.

        Those of a dream round give way to clients, and are on trial until `pass_round`. `trace`
        leads back to the request: it is kept with the job, and said wherever that is told of.
        """
        self._encoder.check(request.config)
        samples = [
            self._encoder.encode(sample, at, request.config)
            for at, sample in enumerate(request.samples)
        ]
        limit = self._settings.trainer.max_queued_samples
        trace = trace or round_id
        accepted = self._ledger.accept(samples, request.config, limit, round_id, trace)
        self._wake.set()
        with bound(job=accepted.job_id, trace=trace):
            num, known = accepted.training_samples, len(accepted.duplicates)
            self._events.note("accepted", samples=num, duplicates=known)
        return accepted

    @ray.method(concurrency_group="control")
    def pass_round(self, round_id: str) -> None:
        """The gate has let a dream round pass: what it taught may be kept."""
        self._ledger.pass_round(round_id)

    @ray.method(concurrency_group="control")
    def job(self, job_id: str) -> JobView:
        """One job; raises NotFound."""
        return self._ledger.job(job_id)

    @ray.method(concurrency_group="control")
    def jobs(self, limit: int) -> list[JobView]:
        """The newest jobs first."""
        return self._ledger.jobs(limit)

    @ray.method(concurrency_group="control")
    def cancel(self, job_id: str) -> JobView:
        """Cancel a job: at once if queued, after the step in progress if training."""
        with _full_disk_said("cancel"):
            view = self._ledger.cancel(job_id)
        self._wake.set()
        return view

    @ray.method(concurrency_group="control")
    def remembered(self, sample_ids: tuple[str, ...], kept: tuple[int, ...]) -> Remembered:
        """What forgetting takes, with what can be returned to; true as long as somebody holds."""
        return self._ledger.remembered(sample_ids, self._versions.weights_version, kept)

    @ray.method(concurrency_group="control")
    def remove(self, removal: Removal) -> None:
        """Forget samples that are not in the live weights, under the hold that is named."""
        if not self._barrier.is_held(removal.token):
            raise Unavailable("the hold has ended and nothing was forgotten; try again")
        with _full_disk_said("forget"):
            self._ledger.forget(removal.sample_ids)
        self._num_returns += 1  # They may be in the job that the training thread has in hand.

    @ray.method(concurrency_group="control")
    def learned(self, version: int, since: int) -> Learned:
        """What was learned between two versions, from the ledger."""
        return self._ledger.learned(version, since)

    @ray.method(concurrency_group="control")
    def holding_forgotten(self, versions: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the versions whose weights have learned what is forgotten."""
        return self._ledger.holding_forgotten(versions)


@contextmanager
def _full_disk_said(verb: str) -> Iterator[None]:
    """Whoever asked is told what to do, and nothing has changed."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise Unavailable(f"the disk is full: free some space and {verb} again") from None
