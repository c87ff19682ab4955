"""`Throttle`: how much of the time the trainer computes, so that answers keep to their budget.

    traffic --gaps of the last answers--> duty --> rest in the middle of a step, again and again
       |                                            work: |###|.......|###|.......|###|
       +--nobody is answered--> computes freely     while answered, duty 0.3

A rest is a few milliseconds after a few milliseconds of work, so that each token waits a little
and none waits for a whole step. The duty follows what was seen, by additive increase and
multiplicative decrease: D.-M. Chiu and R. Jain, "Analysis of the Increase and Decrease Algorithms
for Congestion Avoidance in Computer Networks", 1989. Knows gaps and time; no steps and no tensors.
"""

import time
from collections.abc import Callable
from typing import Final, Protocol

LATE_SHARE: Final = 0.05
"""Of the gaps: a budget for the 95th percentile is kept if at most so many are beyond it."""
NUM_LOOKED_AT: Final = 40
"""Fewest gaps to decide by: two of them may be late. At 15 tokens a second it takes 3 s."""
INCREASE: Final = 0.05
DECREASE: Final = 0.7
FIRST_DUTY: Final = 0.5
"""Until a first answer has been looked at."""
MIN_REST_S: Final = 0.002
"""What is owed is saved up to this: a sleep is longer than asked by some tenths of it."""
REST_SLICE_S: Final = 0.02
"""Longest sleep after which it is looked whether there is still a reason for it."""


class Seen(Protocol):
    """What is known of those who are answered; `Traffic` is it."""

    def idle_s(self) -> float: ...

    def num_gaps(self) -> int: ...

    def gaps_ms(self, since: int) -> list[float]: ...


class Throttle:
    """Rests within the work of one thread; others may read its numbers."""

    def __init__(
        self,
        budget_ms: float | None,
        min_duty: float,
        traffic: Seen,
        is_urgent: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`is_urgent()` says that somebody waits for the work itself: then there is no rest."""
        self._budget_ms, self._min_duty, self._traffic = budget_ms, min_duty, traffic
        self._is_urgent, self._clock, self._sleep = is_urgent, clock, sleep
        self._answering_duty = max(min_duty, FIRST_DUTY)
        self._looked_at = 0
        self._worked_since = clock()

    @property
    def duty(self) -> float:
        """Share of the time in which to compute just now; 1 while nobody is answered."""
        return 1.0 if self._is_free() else self._answering_duty

    def begin(self) -> None:
        """A job begins: what was seen while there was none says nothing about it."""
        self._looked_at = self._traffic.num_gaps()
        self.resume()

    def resume(self) -> None:
        """Work goes on: what lay between was none, and no rest is owed for it."""
        self._worked_since = self._clock()

    def breathe(self) -> float:
        """Rest for the work since the last rest, if anybody is answered; returns the seconds."""
        if self._is_free():
            self._worked_since = self._clock()
            return 0.0
        self._look()
        begun = self._clock()
        owed = (begun - self._worked_since) * (1 - self._answering_duty) / self._answering_duty
        if 0 < owed < MIN_REST_S:
            return 0.0
        end = begun + owed
        while (left := end - self._clock()) > 0 and not self._is_free():
            self._sleep(min(left, REST_SLICE_S))
        self._worked_since = self._clock()
        return self._worked_since - begun

    def _is_free(self) -> bool:
        return self._budget_ms is None or self._traffic.idle_s() > 0 or self._is_urgent()

    def _look(self) -> None:
        """Decide anew, once enough has been seen since the last time."""
        num_gaps = self._traffic.num_gaps()
        if num_gaps - self._looked_at < NUM_LOOKED_AT:
            return
        gaps_ms = self._traffic.gaps_ms(self._looked_at)
        self._looked_at = num_gaps
        assert self._budget_ms is not None
        late = sum(gap > self._budget_ms for gap in gaps_ms)
        if late > LATE_SHARE * len(gaps_ms):
            self._answering_duty = max(self._min_duty, self._answering_duty * DECREASE)
        else:
            self._answering_duty = min(1.0, self._answering_duty + INCREASE)
