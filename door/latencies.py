"""How long clients wait for the first token of a stream and between two, for Prometheus.

    EngineProxy: pace -> first -> gap, gap, gap ...    each labelled `during` = idle | training

Measured where bytes pass, without a look into them. A gap is the wait for the next piece of a
stream, and vLLM writes a piece for each token. `training`: an optimizer step was computed
meanwhile, if only for a moment.
"""

import time
from typing import Final

from prometheus_client import CollectorRegistry, Histogram

from actors.versions import VersionCounter

FIRST_S: Final = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
GAP_S: Final = (
    *(0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1),
    *(0.125, 0.15, 0.2, 0.3, 0.5, 1, 2, 5),
)
DURING: Final = ("idle", "training")


class Latencies:
    """Those of one replica, over all boots of the cell."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        first = Histogram(
            "reverie_first_token_seconds",
            "From a request's body to the first bytes of its stream",
            ["during"],
            buckets=FIRST_S,
            registry=self.registry,
        )
        gap = Histogram(
            "reverie_inter_token_seconds",
            "Wait for the next piece of a stream, nearly always a token",
            ["during"],
            buckets=GAP_S,
            registry=self.registry,
        )
        # Made now, so that a rate can tell the first one from none.
        self.first = [first.labels(during) for during in DURING]
        self.gap = [gap.labels(during) for during in DURING]

    def pace(self, versions: VersionCounter) -> "Pace":
        """For a request that is passed on now."""
        return Pace(self, versions)


class Pace:
    """Of one stream."""

    __slots__ = ("_begun", "_half_steps", "_is_begun", "_latencies", "_versions")

    def __init__(self, latencies: Latencies, versions: VersionCounter) -> None:
        self._latencies, self._versions = latencies, versions
        self._begun, self._half_steps = time.monotonic(), versions.half_steps
        self._is_begun = False

    def first(self) -> None:
        """Its first bytes are here."""
        self._latencies.first[self._during()].observe(time.monotonic() - self._begun)

    def gap(self, seconds: float) -> bool:
        """The next bytes have come, after so long; whether that is a gap between two tokens.

        A chat begins with a piece that names the role, and the first token follows at once.
        """
        during, is_gap = self._during(), self._is_begun
        if is_gap:
            self._latencies.gap[during].observe(seconds)
        self._is_begun = True
        return is_gap

    def _during(self) -> int:
        before, self._half_steps = self._half_steps, self._versions.half_steps
        return int(self._half_steps != before or self._half_steps % 2)
