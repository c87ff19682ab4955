"""How long something took, each time: counts by upper bound, as Prometheus' histograms have them.

Frozen, so that one thread adds while others read, and small, so that it travels in every report.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Final

SECONDS: Final = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 60, 180, 600)
"""From a step of a small model to a commit of a large one."""


@dataclass(frozen=True)
class Distribution:
    """A value counts at the first bound that is not below it; one above all, after the last."""

    bounds: tuple[float, ...] = SECONDS
    counts: tuple[int, ...] = (0,) * (len(SECONDS) + 1)
    total: float = 0.0

    def plus(self, value: float) -> "Distribution":
        """With one more value."""
        at = bisect_left(self.bounds, value)
        counts = (*self.counts[:at], self.counts[at] + 1, *self.counts[at + 1 :])
        return replace(self, counts=counts, total=self.total + value)

    def buckets(self) -> list[tuple[str, float]]:
        """Bounds in words, each with how many values are not above it."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return [(name, sum(self.counts[: at + 1])) for at, name in enumerate(names)]


NOTHING: Final = Distribution()
"""That something has not happened yet."""
