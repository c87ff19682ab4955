"""What a restart or a return of the weights takes back: steps that are in no weights any more.

restart   weights of version v: steps after v are lost, their samples are queued again
return    weights of version v under a new number n: steps between v and n are undone
"""

import sqlite3
from collections.abc import Collection
from typing import Final

from actors.forgetting import Forgetting
from actors.rows import last_step, total_steps

MAX_ENDS: Final = 5
"""So often a job may be training, and no further than before, when the cell ends: one that takes
the trainer's process with it (say, for want of memory) would else keep the cell from all others."""


class TakingBack(Forgetting):
    """Every method is one transaction, on disk when it returns."""

    def recover(self, public_version: int) -> int:
        """Forget the steps that died with the weights; return the version the cell starts at.

        Call it at boot, once the public weights, of `public_version`, are loaded and before any
        job starts. Jobs that lost steps are queued again, unless they had failed or been cancelled.
        The answer is `public_version` where no later version was announced, else a number that was
        never used; until a job starts, a second call gives the same answer.
        """
        with self._transaction() as db:
            for job in db.execute("SELECT * FROM jobs WHERE state = 'training'").fetchall():
                self._count_end(job)
            lost = db.execute(
                "SELECT job_id, MIN(step_index) FROM steps WHERE version > ? GROUP BY job_id",
                (public_version,),
            ).fetchall()
            db.execute("DELETE FROM steps WHERE version > ?", (public_version,))
            for job_id, num_left in lost:
                self._requeue(self._job(job_id), num_left)
            for job in db.execute("SELECT * FROM jobs WHERE state = 'training'").fetchall():
                self._stop_training(job)
            # Those versions name states that are gone; a resumed job starts from a new one.
            db.execute(
                "UPDATE jobs SET version_after = NULL WHERE version_after > ?", (public_version,)
            )
            db.execute(
                "UPDATE jobs SET version_before = NULL WHERE version_before > ? OR "
                "state = 'queued' AND NOT EXISTS (SELECT 1 FROM steps WHERE job_id = jobs.id)",
                (public_version,),
            )
            for table in ("undone", "returns"):  # Of generations that are gone with the weights.
                db.execute(f"DELETE FROM {table} WHERE version > ?", (public_version,))
            high_water = self._high_water()
            return public_version if high_water <= public_version else high_water + 1

    def undo(
        self,
        after: int,
        until: int,
        generation: int,
        *,
        is_again: bool,
        besides: Collection[str] = (),
    ) -> None:
        """Take back the steps of versions between `after` and `until`: the weights are of `after`.

        Their samples are queued again, or cancelled, and a job that was training is queued; one
        that had failed or been cancelled ends so again, after as many steps. Samples named in
        `besides` are forgotten. Versions up to `until` are used up. A second call changes nothing.
        """
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO returns VALUES (?, ?)", (until, after))
            if until <= self._scalar("SELECT value FROM cell WHERE key = 'undone_until'"):
                return  # At every boot this is said again.
            between = "version > ? AND version < ?", (after, until)
            lost = db.execute(
                "SELECT job_id, MIN(step_index), MAX(step_index) + 1 FROM steps "
                f"WHERE {between[0]} GROUP BY job_id",
                between[1],
            ).fetchall()
            columns = "job_id, step_index, sample_id, version, loss"
            db.execute(
                f"INSERT INTO undone SELECT {columns} FROM steps WHERE {between[0]}", between[1]
            )
            db.execute(f"DELETE FROM steps WHERE {between[0]}", between[1])
            for job_id, num_left, num_made in lost:
                job = self._job(job_id)
                if is_again:
                    self._learn_again(job, num_left, num_made)
                    continue
                self._requeue(job, num_left)
                if self._job(job_id)["state"] in ("queued", "training"):
                    error = f"undone by a return to generation {generation}"
                    self._end(job_id, "cancelled", None, error)
            db.execute("UPDATE jobs SET state = 'queued' WHERE state = 'training'")
            self._remove(besides)
            for column in ("version_before", "version_after"):
                db.execute(
                    f"UPDATE jobs SET {column} = NULL WHERE {column} > ? AND {column} < ?",
                    between[1],
                )
            self._set_high_water(max(self._high_water(), until))
            db.execute("UPDATE cell SET value = ? WHERE key = 'undone_until'", (until,))

    def next_version(self) -> int:
        """A version that was neither announced nor reserved."""
        with self._lock:
            return max(self._high_water(), self._newest_version()) + 1

    def _requeue(self, job: sqlite3.Row, num_left: int) -> None:
        """Take back what steps from `num_left` on had done; they are deleted already."""
        left = self._scalar("SELECT COUNT(*) FROM steps WHERE job_id = ?", job["id"])
        assert left == num_left, f"{job['id']}: lost steps in its middle"
        state = job["state"] if job["state"] in ("failed", "cancelled") else "queued"
        self._untrain(job, num_left, state)
        self._db.execute("UPDATE jobs SET has_passed = 0 WHERE id = ?", (job["id"],))
        if job["state"] == "done":
            self._db.execute("UPDATE jobs SET state = 'queued' WHERE id = ?", (job["id"],))

    def _learn_again(self, job: sqlite3.Row, num_left: int, num_made: int) -> None:
        """Queue what the job had made, from step `num_left` on; what the gate let pass may stay."""
        self._untrain(job, num_left, "queued")
        if job["state"] in ("failed", "cancelled"):
            self._db.execute(
                "UPDATE jobs SET again_until = ?, again_as = state WHERE id = ?",
                (num_made, job["id"]),
            )
        self._db.execute("UPDATE jobs SET state = 'queued' WHERE id = ?", (job["id"],))

    def _untrain(self, job: sqlite3.Row, num_left: int, state: str) -> None:
        """Give `state` to the samples of which a step from `num_left` on was the last."""
        self._db.execute(
            "UPDATE samples SET state = ? WHERE job_id = ? AND state = 'trained' AND position >= ?",
            (state, job["id"], num_left - last_step(job, position=0)),
        )

    def _count_end(self, job: sqlite3.Row) -> None:
        """The cell ended while this job was training; its steps, lost ones too, are still there."""
        num_steps = self._num_steps(job["id"])
        num_ends = job["num_ends"] + 1 if num_steps <= job["furthest_step"] else 1
        self._db.execute(
            "UPDATE jobs SET furthest_step = ?, num_ends = ? WHERE id = ?",
            (max(num_steps, job["furthest_step"]), num_ends, job["id"]),
        )

    def _stop_training(self, job: sqlite3.Row) -> None:
        """A job was training when the cell died: it ends if it is owed no step, else it waits."""
        if self._num_steps(job["id"]) == job["again_until"]:
            self._end(job["id"], job["again_as"], None, job["error"])
        elif self._num_steps(job["id"]) == total_steps(job):
            self._end(job["id"], "done", self._view(job).weights_version, None)
        elif job["cancel_requested"]:
            self._end(job["id"], "cancelled", None, None)
        elif job["num_ends"] >= MAX_ENDS:
            error = (
                f"the cell ended {job['num_ends']} times while step {job['furthest_step'] + 1} of "
                "this job was made, so it is given up; see the trainer's log, and whether a "
                "sample needs more memory than there is, then post the rest as a new job"
            )
            self._end(job["id"], "failed", None, error)
        else:
            self._db.execute("UPDATE jobs SET state = 'queued' WHERE id = ?", (job["id"],))
