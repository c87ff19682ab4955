"""What the training thread waits for: room on the disk, rest between steps. A stop ends each."""

import sqlite3
import time
from collections.abc import Callable
from threading import Event
from typing import Final

DISK_RETRY_S: Final = 2.0
REST_SLICE_S: Final = 0.5
LOOK_INTERVAL_S: Final = 0.1


class Waiting:
    """What training waits for, in words that the status shows."""

    def __init__(self, stopping: Event) -> None:
        self._stopping = stopping
        self._no_room: str | None = None
        self.is_ledger_full = False
        """A step is made and cannot be recorded yet: nobody may stand between it and the next."""
        self.nothing_kept: str | None = None
        """Why what is learned could not be kept; set by others, at any time."""

    @property
    def reason(self) -> str | None:
        """What training waits for; None while it waits for nothing."""
        return self._no_room or self.nothing_kept

    def for_room(self, write: Callable[[], None]) -> None:
        """Write to the ledger; waits, visibly, while the disk is full."""
        while True:
            try:
                write()
                self._no_room, self.is_ledger_full = None, False
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                    raise
                self.is_ledger_full = True
                self._no_room = "the disk is full: free some space, training then goes on by itself"
                if self._stopping.wait(DISK_RETRY_S):
                    raise

    def until_kept(self, is_over: Callable[[], bool]) -> None:
        """Wait while nothing that is learned could be kept; `is_over` ends it."""
        while self.nothing_kept is not None and not is_over():
            if self._stopping.wait(REST_SLICE_S):
                return

    def until(self, may_go_on: Callable[[], bool]) -> None:
        """Wait for something that is looked at often."""
        while not may_go_on() and not self._stopping.wait(LOOK_INTERVAL_S):
            pass

    def rest(
        self, seconds: float, duty: float, is_over: Callable[[], bool], rested: float = 0.0
    ) -> None:
        """Sleep so that `duty` of the time is spent computing; `is_over` ends the sleep.

        `seconds` were computed, and `rested` slept already.
        """
        end = time.monotonic() + seconds * (1.0 - duty) / duty - rested
        while (left := end - time.monotonic()) > 0:
            if self._stopping.wait(min(left, REST_SLICE_S)) or is_over():
                return
