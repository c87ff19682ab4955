"""The numbers of `/metrics` through Ray's own exporter, for clusters that scrape only that.

    Metrics --every ray_metrics_s--> Ray's gauges --> the node's agent --> ray_reverie_... for all

One Prometheus job for all nodes then finds them, by Ray's service discovery. Prefer the door: these
come later by some seconds, and pass two more processes. Every sample is a gauge of its own name, a
bucket and a counter, too: Ray would count them anew, and PromQL asks for names only. Of what is not
known now, Ray keeps the last value.
"""

import asyncio
import logging
import time

from ray.util.metrics import Gauge

from door.metrics import Metrics

log = logging.getLogger(__name__)


class RayMetrics:
    """Those of one replica."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._due = time.monotonic()
        self._gauges: dict[str, Gauge] = {}
        self._is_lost = False

    async def tell(self, metrics: Metrics) -> None:
        """Give them to Ray, if it is time."""
        if not self._interval_s or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._interval_s
        try:
            await asyncio.to_thread(self._tell, metrics)
            self._is_lost = False
        except Exception as error:  # Nobody's answer waits for it, and it is told anew.
            if not self._is_lost:
                log.warning("Ray's exporter is not told: %s", type(error).__name__)
            self._is_lost = True

    def _tell(self, metrics: Metrics) -> None:
        for family in metrics.collect():
            for name, labels, value, *_ in family.samples:
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, family.documentation, tuple(labels))
                self._gauges[name].set(value, dict(labels))
