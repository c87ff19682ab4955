"""Where a step's time goes, on the clock of the device that computes.

    prefix --> forward --> backward <--> optimizer
              a tensor's update interrupts the backward pass; on a CPU a rest any of them

A GPU is asked nothing before the step is over: it notes the time in its own stream.
"""

import time
from itertools import pairwise
from typing import Literal

import torch

Part = Literal["prefix", "forward", "backward", "optimizer", "rested"]


class Stopwatch:
    """Adds up the time of each part of one step after the other."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self._marks: list[tuple[Part | None, float | torch.cuda.Event]] = []

    @property
    def part(self) -> Part | None:
        """What is timed just now."""
        return self._marks[-1][0] if self._marks else None

    def mark(self, part: Part | None) -> None:
        """From here on time belongs to `part`; None: to nothing."""
        if not self.is_gpu:
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def read(self) -> dict[Part, float]:
        """Seconds of each part since the last reading; waits for the GPU."""
        marks, self._marks = self._marks, []
        if marks and isinstance(marks[-1][1], torch.cuda.Event):
            marks[-1][1].synchronize()
        found: dict[Part, float] = {}
        for (part, begun), (_, ended) in pairwise(marks):
            if part is not None:
                found[part] = found.get(part, 0.0) + _between(begun, ended)
        return found


def _between(begun: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(begun, torch.cuda.Event):
        assert isinstance(ended, torch.cuda.Event)
        return float(begun.elapsed_time(ended)) / 1000
    assert isinstance(ended, float)
    return ended - begun
