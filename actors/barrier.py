"""`StepBarrier`: lets others stand between two optimizer steps while the trainer waits.

    trainer:    with barrier.step(): ... one step ...        (waits while somebody holds)
    checkpoint: token = barrier.hold(timeout_s) ... barrier.release(token) -> was it held?

Holders go before steps: a trainer that steps back to back cannot starve a checkpoint.
"""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepBarrier:
    """One stepper, one holder at a time. The stepper waits as long as somebody holds: the cell
    watches the holder, and restarts when it dies."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_stepping = False
        self._num_waiting = 0
        self._token: str | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run one step while nobody holds the barrier; waits for holders first."""
        with self._changed:
            while self._token is not None or self._num_waiting:
                self._changed.wait()
            self._is_stepping = True
        try:
            yield
        finally:
            with self._changed:
                self._is_stepping = False
                self._changed.notify_all()

    def hold(self, timeout_s: float) -> str | None:
        """Wait for the step in progress and keep the next from starting; None after `timeout_s`."""
        with self._changed:
            self._num_waiting += 1
            try:
                is_free = self._changed.wait_for(
                    lambda: not self._is_stepping and self._token is None, timeout_s
                )
                if not is_free:
                    return None
                self._token = secrets.token_hex(8)
                return self._token
            finally:
                self._num_waiting -= 1
                self._changed.notify_all()

    def is_held(self, token: str) -> bool:
        """Whether the hold that `token` names is in force."""
        with self._changed:
            return self._token == token

    def release(self, token: str) -> bool:
        """End a hold; False if it was not in force any more: what was read under it is void."""
        with self._changed:
            if self._token != token:
                return False
            self._token = None
            self._changed.notify_all()
            return True
