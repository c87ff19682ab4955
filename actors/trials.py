"""Dream rounds in the ledger: their jobs give way, and are on trial until they pass the gate.

accept(round_id=...)   steps             pass_round        -> what it taught may be kept
------------------> -> on trial -------> undo              -> as if it had not been
                                  \\----> a restart         -> queued again, on trial again
"""

from actors.taking_back import TakingBack


class Trials(TakingBack):
    """Every method is one transaction, on disk when it returns."""

    def on_trial(self) -> str | None:
        """The round that has steps in the weights and has not passed; None if there is none."""
        with self._lock:
            row = self._row(
                "SELECT round_id FROM jobs WHERE round_id IS NOT NULL AND NOT has_passed AND "
                "EXISTS (SELECT 1 FROM steps WHERE job_id = jobs.id) ORDER BY seq DESC LIMIT 1"
            )
            return None if row is None else str(row["round_id"])

    def pass_round(self, round_id: str) -> None:
        """What the round's jobs have taught may be kept."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET has_passed = 1 WHERE round_id = ?", (round_id,))

    def has_client_jobs(self) -> bool:
        """Whether a job that is no dream's waits or is being trained."""
        with self._lock:
            return bool(
                self._scalar(
                    "SELECT EXISTS (SELECT 1 FROM jobs WHERE round_id IS NULL "
                    "AND state IN ('queued', 'training'))"
                )
            )
