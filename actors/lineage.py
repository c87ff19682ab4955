"""Which steps are in the weights of a version, whatever was undone and brought back since.

    steps    1 2 3 . 5 6 . 8       4 is a return to version 2, and 7 one to version 3
    of 8:    8, and 3, 2, 1        as spans, newest first: after 7 until 8, after 0 until 3
    of 6:    5, 6, and 2, 1        after 4 until 6, after 0 until 2

What a crash has lost is in no weights that anybody kept, and is not remembered.
"""

import json
import sqlite3
from collections.abc import Collection, Sequence

from actors.ledger_rows import LedgerRows

Span = tuple[int, int]
"""After this version, until that one."""


class Lineage(LedgerRows):
    """Called with the lock held; changes nothing."""

    def _spans(self, version: int, since: int = -1) -> list[Span]:
        """Versions whose steps are in the weights of `version`, newest first.

        Only those after `since`: with the version of a parent, what a generation has learned.
        """
        spans = []
        while version > since:
            row = self._row(
                "SELECT version, after FROM returns WHERE version <= ? "
                "ORDER BY version DESC LIMIT 1",
                version,
            )
            begun, before = (0, since) if row is None else (row["version"], row["after"])
            spans.append((max(begun, since), version))
            version = before
        return spans

    def _made(self, spans: Sequence[Span]) -> list[sqlite3.Row]:
        """The steps of these spans, oldest first."""
        return [
            step
            for span in reversed(spans)
            for step in self._db.execute(
                "SELECT * FROM made WHERE version > ? AND version <= ? ORDER BY version", span
            )
        ]

    def _first_of(self, sample_ids: Collection[str], version: int) -> int | None:
        """The version that first held one of the samples, on the way to `version`."""
        for span in reversed(self._spans(version)):
            row = self._row(
                "SELECT MIN(version) AS first FROM made WHERE version > ? AND version <= ? "
                "AND sample_id IN (SELECT value FROM json_each(?))",
                *span,
                json.dumps(list(sample_ids)),
            )
            if row is not None and row["first"] is not None:
                return int(row["first"])
        return None

    def _is_on_the_way(self, version: int, goal: int) -> bool:
        """Whether the weights of `goal` were made from those of `version`."""
        return any(after <= version <= until for after, until in self._spans(goal))
