"""Forgetting samples: what it takes, and what is left of them here afterwards, which is an id.

    in the live weights    the weights return to before it; `TakingBack.undo` then removes it
    waiting, or at its end without a step in the weights    `forget` removes it

A sample that is removed leaves a tombstone without text or hash, so that its id is never accepted
again. The samples after it in its job move up: its own first step, which is undone with the rest,
was in the job's first epoch and after theirs, so the steps that stay are of the same positions.
"""

import json
import sqlite3
import time
from bisect import bisect_right
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final

from actors.lineage import Lineage
from actors.past import Remembered

FORGOTTEN: Final = "all of its samples are forgotten"


class Forgetting(Lineage):
    """Every public method is one transaction, on disk when it returns."""

    def remembered(
        self, sample_ids: Collection[str], version: int, kept: Sequence[int]
    ) -> Remembered:
        """What forgetting these samples takes, with the weights at `version`.

        `kept` are the versions that can be returned to.
        """
        with self._lock:
            missing = next(filter(None, map(self._why_missing, sample_ids)), None)
            first = self._first_of(sample_ids, version)
            if first is None:
                return Remembered(missing)
            clean = [each for each in kept if each < first and self._is_on_the_way(each, version)]
            if not clean:
                return Remembered(missing, is_learned=True)
            goal = max(clean)
            steps = self._made(self._spans(version, since=goal))
            others = [step for step in steps if step["sample_id"] not in sample_ids]
            again = [step for step in others if self._is_recorded(step["version"])]
            return Remembered(
                missing=missing,
                is_learned=True,
                clean_version=goal,
                jobs=tuple(dict.fromkeys(step["job_id"] for step in steps)),
                num_steps=len(steps),
                num_again=len(again),
                num_samples_again=len({step["sample_id"] for step in again}),
                num_lost=len(others) - len(again),
            )

    def forget(self, sample_ids: Collection[str]) -> None:
        """Remove samples of which no step is in the live weights; others stay in their jobs."""
        with self._transaction():
            self._remove(sample_ids)
        self.wipe()

    def holding_forgotten(self, versions: Sequence[int]) -> tuple[int, ...]:
        """Those of the versions whose weights have learned what is forgotten."""
        with self._lock:
            rows = self._db.execute(
                "SELECT version FROM made WHERE sample_id IN (SELECT id FROM forgotten)"
            )
            made = sorted(row["version"] for row in rows)
            return tuple(
                each
                for each in versions
                if any(
                    bisect_right(made, after) < bisect_right(made, until)
                    for after, until in self._spans(each)
                )
            )

    def wipe(self) -> None:
        """Leave nothing of removed rows in the write-ahead log either; SQLite zeroes the rest.

        On a full disk that waits for the next time, or boot.
        """
        with self._lock, suppress(sqlite3.OperationalError):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # Below, the lock is held.

    def _why_missing(self, sample_id: str) -> str | None:
        if self._is_forgotten(sample_id):
            return f"sample {sample_id!r} is forgotten already"
        if self._row("SELECT 1 FROM samples WHERE id = ?", sample_id) is None:
            return f"there is no sample {sample_id!r} to forget"
        return None

    def _is_recorded(self, version: int) -> bool:
        return self._row("SELECT 1 FROM steps WHERE version = ?", version) is not None

    def _is_forgotten(self, sample_id: str) -> bool:
        return self._row("SELECT 1 FROM forgotten WHERE id = ?", sample_id) is not None

    def _remove(self, sample_ids: Collection[str]) -> None:
        """Those that are removed already are left out."""
        known = self._db.execute(
            "SELECT id FROM samples WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(sample_ids)),),
        ).fetchall()
        for row in known:
            self._remove_one(row["id"])

    def _remove_one(self, sample_id: str) -> None:
        row = self._row("SELECT job_id, position FROM samples WHERE id = ?", sample_id)
        assert row is not None
        job, at = self._job(row["job_id"]), row["position"]
        assert self._num_steps(job["id"]) <= at, f"{sample_id} has steps in the weights"
        self._db.execute("DELETE FROM samples WHERE id = ?", (sample_id,))
        self._db.execute(
            "INSERT INTO forgotten VALUES (?, ?, ?)", (sample_id, job["id"], time.time())
        )
        # In two moves: positions of a job are unique after each row.
        self._db.execute(
            "UPDATE samples SET position = -position WHERE job_id = ? AND position > ?",
            (job["id"], at),
        )
        self._db.execute(
            "UPDATE samples SET position = -position - 1 WHERE job_id = ? AND position < 0",
            (job["id"],),
        )
        until = job["again_until"]
        if until is not None:
            until -= sum(step % job["num_samples"] == at for step in range(until))
        self._db.execute(
            "UPDATE jobs SET num_samples = num_samples - 1, again_until = ? WHERE id = ?",
            (until, job["id"]),
        )
        if job["num_samples"] == 1 and job["state"] in ("queued", "training"):
            self._end(job["id"], job["again_as"] or "cancelled", None, job["error"] or FORGOTTEN)
