"""What the training thread tells of the job it has in hand: to the event log, and to the log.

begin --> step, step, step ... --a line for many--> end
"""

import time
from collections.abc import Callable
from typing import Final

from actors.events import Events
from actors.logs import bind
from actors.messages import EndState, QueuedJob

LINE_INTERVAL_S: Final = 5.0
"""Steps are told together: those of so much time in one line."""


class JobLog:
    """Belongs to one thread."""

    def __init__(self, events: Events, clock: Callable[[], float] = time.monotonic) -> None:
        self._events, self._clock = events, clock
        self._steps: list[tuple[int, int, float, float, int]] = []
        self._told = 0.0

    def begin(self, job: QueuedJob, version: int) -> None:
        """From here on, whatever this thread logs is about the job."""
        bind(job=job.job_id, trace=job.trace)
        self._steps, self._told = [], self._clock()
        self._events.note(
            "job_begun",
            version=version,
            samples=len(job.samples),
            steps_done=job.steps_done,
            steps=job.end,
            round=job.round_id,
        )

    def step(self, number: int, version: int, loss: float, seconds: float, tokens: int) -> None:
        """Its step of that number, from 1 on, has been made and recorded."""
        self._steps.append((number, version, loss, seconds, tokens))
        if self._clock() - self._told >= LINE_INTERVAL_S:
            self.tell()

    def tell(self) -> None:
        """Tell of the steps that were not told of yet."""
        self._told = self._clock()
        if not self._steps:
            return
        numbers, versions, losses, seconds, tokens = zip(*self._steps, strict=True)
        self._steps = []
        self._events.note(
            "steps",
            first_step=numbers[0],
            last_step=numbers[-1],
            first_version=versions[0],
            version=versions[-1],
            first_loss=round(losses[0], 6),
            last_loss=round(losses[-1], 6),
            seconds=round(sum(seconds), 3),
            tokens=sum(tokens),
        )

    def end(self, state: EndState, version: int) -> None:
        """It is at its end, which is recorded, in the ledger with its error's words."""
        self.tell()
        self._events.note("job_ended", state=state, version=version)
        bind()
