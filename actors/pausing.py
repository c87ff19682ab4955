"""Keeping the engine still while the trainer steps: an experiment's setting, off as it is served.

    trainer --pause--> engine   no forward pass runs, requests wait, none is ended
            one step
            --resume-> engine   they go on

Resumed whatever became of the step; if the trainer cannot say so, the engine goes on by itself
after the limit that the pause came with, and a trainer that died takes the engine with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray

from actors.ending import NAMESPACE

ANSWER_TIMEOUT_S: Final = 30
"""Longest wait for the engine to become still, one forward pass, or to go on."""


@contextmanager
def paused_engine(limit_s: float) -> Iterator[None]:
    """No forward pass runs inside, for at most `limit_s` from its beginning.

    Raises Ray's GetTimeoutError if the engine does not answer: the cell then restarts.
    """
    engine: Any = ray.get_actor("engine", NAMESPACE)
    try:
        ray.get(engine.pause.remote(limit_s), timeout=ANSWER_TIMEOUT_S)
        yield
    finally:
        ray.get(engine.resume.remote(), timeout=ANSWER_TIMEOUT_S)
