"""The ledger's low-level reads and writes: called with the lock held, inside a transaction."""

import sqlite3
from typing import Final

from actors.database import Database
from actors.errors import Conflict, NotFound
from actors.ledger_schema import MIGRATIONS, SCHEMA
from actors.messages import JobState, JobView
from actors.rows import view_of

MAX_LOSS_HISTORY: Final = 1000
"""Most steps that a JobView tells of; the reply stays small however long the job."""


class LedgerRows(Database):
    """Jobs, samples, steps and counters, one at a time."""

    NOUN = "ledger"
    SCHEMA = SCHEMA
    MIGRATIONS = MIGRATIONS

    def _end(self, job_id: str, state: JobState, version: int | None, error: str | None) -> None:
        self._db.execute(
            "UPDATE jobs SET state = ?, version_after = ?, error = ?, cancel_requested = 0, "
            "again_until = NULL, again_as = NULL WHERE id = ?",
            (state, version, error, job_id),
        )
        left = self._db.execute(
            "UPDATE samples SET state = ? WHERE job_id = ? AND state = 'queued'", (state, job_id)
        )
        assert state != "done" or left.rowcount == 0, f"{job_id}: {left.rowcount} samples untrained"

    def _view(self, job: sqlite3.Row) -> JobView:
        recent = self._db.execute(
            "SELECT * FROM steps WHERE job_id = ? ORDER BY step_index DESC LIMIT ?",
            (job["id"], MAX_LOSS_HISTORY),
        ).fetchall()
        return view_of(job, recent)

    def _job(self, job_id: str) -> sqlite3.Row:
        job = self._row("SELECT * FROM jobs WHERE id = ?", job_id)
        if job is None:
            raise NotFound(f"there is no job {job_id!r}; GET /train/jobs lists them")
        return job

    def _live_job(self, job_id: str) -> sqlite3.Row:
        job = self._job(job_id)
        if job["state"] not in ("queued", "training"):
            raise Conflict(f"job {job_id!r} is {job['state']} already and stays so")
        return job

    def _num_steps(self, job_id: str) -> int:
        return self._scalar(
            "SELECT COALESCE(MAX(step_index) + 1, 0) FROM steps WHERE job_id = ?", job_id
        )

    def _num_queued(self) -> int:
        return self._scalar("SELECT COUNT(*) FROM samples WHERE state = 'queued'")

    def _high_water(self) -> int:
        return self._scalar("SELECT value FROM cell WHERE key = 'version_high_water'")

    def _newest_version(self) -> int:
        return self._scalar("SELECT COALESCE(MAX(version), 0) FROM steps")

    def _settle(self, version: int) -> None:
        assert version >= self._newest_version(), f"version {version} is in the past"
        self._set_high_water(version)

    def _set_high_water(self, version: int) -> None:
        self._db.execute("UPDATE cell SET value = ? WHERE key = 'version_high_water'", (version,))
