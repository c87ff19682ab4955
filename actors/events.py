"""The event log: what has happened in a cell, one JSON line for each thing, in the order it did.

{"time", "role", "event", "job", "trace", ...facts}        REVERIE_HOME/state/NAME/events.jsonl

cell        boot, recovery, failed, stop    checkpoint   commit, publication, rollback, forgotten
trainer     accepted, job_begun, steps, job_ended        dream   round_begun, round_left

For people and their tools, who read what is truly durable elsewhere: lines are not synced, one that
cannot be written is lost, and nothing waits long for it. Ids, numbers, and why a boot ended; the
words of a job's or a round's error are in the ledger and in its report. Never texts, never keys.
"""

import logging
from pathlib import Path
from typing import Any, Final

from actors.line_file import LineFile
from actors.logs import bound_ids

log = logging.getLogger(__name__)

NAME: Final = "events"
MAX_BYTES: Final = 16 * 1024**2
LOCK_TIMEOUT_S: Final = 0.1
"""Longest wait for another role's line: loops that answer others call this, too."""
MAX_FILES: Final = 8
"""144 MiB in all; a busy trainer writes some 30 MiB a day."""


class Events:
    """What one role tells; any thread may."""

    def __init__(self, folder: Path, role: str) -> None:
        self._file = LineFile(folder, NAME, MAX_BYTES, MAX_FILES, LOCK_TIMEOUT_S)
        self._role = role
        self._is_lost = False

    def note(self, event: str, **facts: Any) -> None:
        """Add a line, and log it; facts that are None are left out. Never raises for the disk."""
        known = {key: value for key, value in facts.items() if value is not None}
        log.info(event, extra=known)
        try:
            self._file.add({"role": self._role, "event": event} | dict(bound_ids()) | known)
            self._is_lost = False
        except OSError as error:
            if not self._is_lost:  # Once: the next ones will not be written either.
                log.warning("events are lost: %s", error.strerror)
            self._is_lost = True
