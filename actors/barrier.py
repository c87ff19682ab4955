"""`StepBarrier`: lets others stand between two optimizer steps while the trainer waits.

    trainer:    with barrier.step(): ... one step ...        (waits while somebody holds)
    checkpoint: barrier.hold(token, timeout_s) ... barrier.release(token) -> was it held?

Holders go before steps: a trainer that steps back to back cannot starve a checkpoint.
"""

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
        self._given_up: set[str] = set()

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

    def hold(self, token: str, timeout_s: float) -> bool:
        """Wait for the step in progress and keep the next from starting; False after `timeout_s`.

        The caller chooses the token, so that it can release what it has not heard of.
        """
        with self._changed:
            self._num_waiting += 1
            try:
                is_free = self._changed.wait_for(
                    lambda: not self._is_stepping and self._token is None, timeout_s
                )
                if not is_free or token in self._given_up:
                    return False
                self._token = token
                return True
            finally:
                self._num_waiting -= 1
                self._changed.notify_all()

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for the step in progress."""
        return self._num_waiting > 0

    def is_held(self, token: str) -> bool:
        """Whether the hold that `token` names is in force."""
        with self._changed:
            return self._token == token

    def release(self, token: str) -> bool:
        """End a hold; False if it was not in force any more: what was read under it is void.

        A hold that begins later under this token, because its call was late, is not granted.
        """
        with self._changed:
            self._given_up.add(token)
            if self._token != token:
                return False
            self._token = None
            self._changed.notify_all()
            return True
