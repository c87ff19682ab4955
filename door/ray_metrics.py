"""The numbers of `/metrics` through Ray's own exporter, for clusters that scrape only that.

    Metrics --every ray_metrics_s--> Ray's gauges --> the node's agent --> ray_reverie_... for all

One Prometheus job for all nodes then finds them, by Ray's service discovery. Prefer the door: these
come later by some seconds, and pass two more processes. Every sample is a gauge of its own name, a
bucket and a counter, too: Ray would count them anew, and PromQL asks for names only.
"""

import asyncio
import contextlib
import time

from ray.util.metrics import Gauge

from door.metrics import Metrics


class RayMetrics:
    """Those of one replica."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._due = time.monotonic()
        self._gauges: dict[str, Gauge] = {}

    async def tell(self, metrics: Metrics) -> None:
        """Give them to Ray, if it is time."""
        if not self._interval_s or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._interval_s
        with contextlib.suppress(Exception):  # Whatever Ray has, it is told anew.
            await asyncio.to_thread(self._tell, metrics)

    def _tell(self, metrics: Metrics) -> None:
        for family in metrics.collect():
            for name, labels, value, *_ in family.samples:
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, family.documentation, tuple(labels))
                self._gauges[name].set(value, dict(labels))
