"""`Ledger`: the truth about what was accepted and what was trained, durable before it is announced.

One SQLite file, one writing process. A job has n samples and `epochs`; its step i trains sample
i % n, so a job's recorded steps are always 0..k-1 and k alone says where it resumes. The ledger
knows nothing of tensors or files of weights: it is told which version of the weights is public.

      accept          start_job           finish_job
    ---------> queued ---------> training ----------> done | failed | cancelled
                  ^ |                |                  |
                  | +- cancel -------|------------------|-> cancelled
                  +-- recover: its steps were lost -----+     (failed and cancelled stay)

A job in whose training the cell ends MAX_ENDS times, and which never gets further, is failed.
"""

import secrets
import sqlite3
import time
from collections.abc import Sequence
from typing import get_args

from actors.errors import Conflict, NotFound, SettingsError, TooBusy, Unavailable
from actors.history import History
from actors.messages import (
    Acceptance,
    EndState,
    JobState,
    JobView,
    QueuedJob,
    SampleState,
    TrainingSample,
)
from actors.posted import TrainConfig
from actors.rows import last_step, sample_columns, sample_of, total_steps


class Ledger(History):
    """Every method that changes something is one transaction, on disk when it returns.

    Safe for threads; every call may wait for the disk, and for BUSY_TIMEOUT_S for another process.
    """

    _counted: tuple[int, dict[SampleState, int]] = (-1, {})
    """Samples by state, and after how many changes."""

    def claim(self, adopted: float) -> None:
        """Tie this ledger to the adoption (its time) that its steps build on.

        Raises SettingsError where it belongs to another one: to teach its samples to a model that
        was adopted anew would bring back what somebody removed.
        """
        with self._transaction() as db:
            known = self._row("SELECT value FROM cell WHERE key = 'adopted'")
            if known is None:
                db.execute("INSERT INTO cell VALUES ('adopted', ?)", (adopted,))
            elif known["value"] != adopted:
                raise SettingsError(
                    "the model was adopted anew, but its ledger is that of the one before; move "
                    "REVERIE_HOME/state/NAME away to start afresh"
                )

    def accept(
        self,
        samples: Sequence[TrainingSample],
        config: TrainConfig,
        max_queued: int,
        round_id: str | None = None,
        trace: str | None = None,
    ) -> Acceptance:
        """Queue the samples as one job, except those accepted before; all of them or none.

        The job is a client's, or that of the dream round which is named; `trace` is kept with it.
        If every sample was accepted before, the answer names the first one's job. Raises Conflict
        for a known id with other content, TooBusy where more than `max_queued` samples would wait,
        Unavailable if the disk is full.
        """
        assert samples, "a job has at least one sample"
        assert all(sample.content_hash for sample in samples), "a sample carries its content's hash"
        try:
            with self._transaction():
                return self._accept(samples, config, max_queued, round_id, trace)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            raise Unavailable(
                "the disk that holds the ledger is full and nothing was accepted; "
                "free some space and post the same request again"
            ) from error

    def next_job(self) -> QueuedJob | None:
        """The oldest job that is not at its end, as far as it came; None if there is none.

        A dream's job comes after all of the clients'.
        """
        with self._lock:
            job = self._row(
                "SELECT * FROM jobs WHERE state IN ('queued', 'training') "
                "ORDER BY round_id IS NOT NULL, seq LIMIT 1"
            )
            if job is None:
                return None
            rows = self._db.execute(
                "SELECT * FROM samples WHERE job_id = ? ORDER BY position", (job["id"],)
            )
            return QueuedJob(
                job_id=job["id"],
                samples=tuple(sample_of(row) for row in rows),
                config=TrainConfig.model_validate_json(job["config"]),
                steps_done=self._num_steps(job["id"]),
                round_id=job["round_id"],
                trace=job["trace"],
                again_until=job["again_until"],
                ends_as=job["again_as"] or "done",
                error=job["error"] if job["again_as"] else None,
            )

    def start_job(self, job_id: str, version: int) -> None:
        """Mark the job as training from `version`, and reserve the versions its steps will make.

        A version that was announced before a crash must never name another state after it, so the
        names are set aside before the first step. Raises Conflict if it was cancelled meanwhile.
        """
        with self._transaction() as db:
            job = self._live_job(job_id)
            remaining = total_steps(job) - self._num_steps(job_id)
            db.execute(
                "UPDATE jobs SET state = 'training', "
                "version_before = COALESCE(version_before, ?) WHERE id = ?",
                (version, job_id),
            )
            self._set_high_water(max(self._high_water(), version + remaining))

    def record_step(
        self,
        job_id: str,
        step_index: int,
        sample_id: str,
        version: int,
        loss: float,
        seconds: float,
    ) -> None:
        """Note that the step was made and gave the weights `version`.

        Call it before any checkpoint may see that version. Raises sqlite3.IntegrityError for a
        step or a version that is recorded already, or a loss that is not a number.
        """
        with self._transaction() as db:
            job, newest = self._job(job_id), self._newest_version()
            num_steps = self._num_steps(job_id)
            assert job["state"] == "training", f"{job_id} is {job['state']}, not training"
            db.execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?)",
                (job_id, step_index, sample_id, version, loss, seconds),
            )
            assert step_index == num_steps < total_steps(job), f"{job_id}: step {step_index}?"
            assert newest < version <= self._high_water(), f"version {version} was not reserved"
            position = step_index % job["num_samples"]
            turn = self._row(
                "SELECT id FROM samples WHERE job_id = ? AND position = ?", job_id, position
            )
            assert turn is not None and turn["id"] == sample_id, f"{sample_id}: not its turn"
            if step_index == last_step(job, position):
                db.execute("UPDATE samples SET state = 'trained' WHERE id = ?", (sample_id,))

    def finish_job(
        self,
        job_id: str,
        state: EndState,
        version: int,
        error: str | None = None,
    ) -> None:
        """End the job at `version`, the newest that was announced; reserved ones are free again.

        What it did not train becomes failed or cancelled with it.
        """
        with self._transaction():
            self._live_job(job_id)
            self._end(job_id, state, version, error)
            self._settle(version)

    def settle(self, version: int) -> None:
        """Free the reserved versions: training has stopped, `version` is the newest announced."""
        with self._transaction():
            self._settle(version)

    def cancel(self, job_id: str) -> JobView:
        """Cancel a queued job at once; ask for it where the job is training.

        Raises NotFound, or Conflict for a job that is at its end.
        """
        with self._transaction() as db:
            job = self._live_job(job_id)
            if job["state"] == "queued":
                self._end(job_id, "cancelled", job["version_after"], None)
            else:
                db.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,))
            return self._view(self._job(job_id))

    def is_cancel_requested(self, job_id: str) -> bool:
        """Whether the trainer should end this job before its next step."""
        with self._lock:
            return bool(self._job(job_id)["cancel_requested"])

    def job(self, job_id: str) -> JobView:
        """One job; raises NotFound."""
        with self._lock:
            return self._view(self._job(job_id))

    def jobs(self, limit: int, state: JobState | None = None) -> list[JobView]:
        """At most `limit` jobs, newest first; all states unless one is named."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM jobs WHERE ?1 IS NULL OR state = ?1 ORDER BY seq DESC LIMIT ?2",
                (state, limit),
            ).fetchall()
            return [self._view(row) for row in rows]

    def counts(self) -> dict[SampleState, int]:
        """How many samples are in each state, every state included; counted after changes only."""
        with self._lock:
            if self._counted[0] != (now := self._db.total_changes):
                counts: dict[SampleState, int] = dict.fromkeys(get_args(SampleState), 0)
                rows = self._db.execute("SELECT state, COUNT(*) FROM samples GROUP BY state")
                counts.update(rows.fetchall())
                self._counted = now, counts
            return dict(self._counted[1])

    def queued_samples(self) -> int:
        """How many samples wait: what `max_queued` bounds."""
        with self._lock:
            return self._num_queued()

    def sample_state(self, sample_id: str) -> tuple[SampleState, int | None]:
        """The sample's state and, once trained, the version that its last epoch made.

        Raises NotFound.
        """
        with self._lock:
            sample = self._row("SELECT * FROM samples WHERE id = ?", sample_id)
            if sample is None:
                raise NotFound(f"sample {sample_id!r} was never accepted, or is forgotten")
            if sample["state"] != "trained":
                return sample["state"], None
            job_id = sample["job_id"]
            last = last_step(self._job(job_id), sample["position"])
            return sample["state"], self._scalar(
                "SELECT version FROM steps WHERE job_id = ? AND step_index = ?", job_id, last
            )

    # Below, the lock is held.

    def _accept(
        self,
        samples: Sequence[TrainingSample],
        config: TrainConfig,
        max_queued: int,
        round_id: str | None,
        trace: str | None,
    ) -> Acceptance:
        fresh: dict[str, TrainingSample] = {}
        duplicates: list[str] = []
        for sample in samples:
            known = self._row("SELECT content_hash FROM samples WHERE id = ?", sample.id)
            if known is None and self._is_forgotten(sample.id):
                raise Conflict(
                    f"sample id {sample.id!r} was forgotten and is never learned again; nothing of "
                    "this request was queued: leave it out, or give it a new id"
                ).about("samples")
            if known is None and sample.id not in fresh:
                fresh[sample.id] = sample
                continue
            known_hash = fresh[sample.id].content_hash if known is None else known["content_hash"]
            if known_hash != sample.content_hash:
                raise Conflict(
                    f"sample id {sample.id!r} was used before with other content; nothing of this "
                    "request was queued: give the new content a new id"
                ).about("samples")
            duplicates.append(sample.id)
        if not fresh:
            return self._accepted_before(tuple(duplicates))
        num_queued = self._num_queued()
        if num_queued + len(fresh) > max_queued:
            raise TooBusy(
                f"{num_queued} samples are queued and {len(fresh)} more would exceed the bound of "
                f"{max_queued}; nothing of this request was queued: send it later, or in parts"
            )
        job_id = self._insert_job(tuple(fresh.values()), config, round_id, trace)
        return Acceptance(job_id, "queued", len(fresh), tuple(duplicates))

    def _accepted_before(self, duplicates: tuple[str, ...]) -> Acceptance:
        job = self._row(
            "SELECT * FROM jobs WHERE id = (SELECT job_id FROM samples WHERE id = ?)", duplicates[0]
        )
        assert job is not None, f"{duplicates[0]} has no job"
        return Acceptance(job["id"], job["state"], 0, duplicates)

    def _insert_job(
        self,
        samples: tuple[TrainingSample, ...],
        config: TrainConfig,
        round_id: str | None,
        trace: str | None,
    ) -> str:
        job_id, now = f"job-{secrets.token_hex(8)}", time.time()
        self._db.execute(
            "INSERT INTO jobs (id, created, state, config, num_samples, epochs, round_id, trace) "
            "VALUES (?, ?, 'queued', ?, ?, ?, ?, ?)",
            (job_id, now, config.model_dump_json(), len(samples), config.epochs, round_id, trace),
        )
        self._db.executemany(
            "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                sample_columns(sample, job_id, position, now)
                for position, sample in enumerate(samples)
            ),
        )
        return job_id
