"""Owns what is proposed, judged and gated. The dream loop is not built yet: idle, and says so."""

import os

import ray

from actors.messages import DreamReport


class Dreamer:
    """Present in the cell, so that its place, its supervision and its shutdown are real."""

    @ray.method
    async def report(self) -> DreamReport:
        """The state of the loop."""
        return DreamReport(pid=os.getpid())
