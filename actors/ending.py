"""Ending what the cell started: actors by name, processes by id, never by a pattern.

An actor whose name is free may still be inside a write. So everything that could touch the weights
or the public directory is waited for, as a process, before the next boot reads either.
"""

import contextlib
import time
from collections.abc import Iterable
from typing import Any, Final

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import get_placement_group, remove_placement_group

from actors.errors import BootFailed

NAMESPACE: Final = "reverie"
CELL: Final = "cell"
ROLES: Final = ("engine", "trainer", "checkpoint", "dream")
"""Names under which the actors are found."""
AROUND: Final = ROLES[1:]
"""Those whose end the engine survives."""
CHILD_EXIT_TIMEOUT_S: Final = 15
EVICT_TIMEOUT_S: Final = 20
REPORT_TIMEOUT_S: Final = 2


def evict() -> None:
    """End what an earlier life of this actor left: the four actors, by name, and their place.

    Raises BootFailed if a name does not become free.
    """
    for role in ROLES:
        deadline = time.monotonic() + EVICT_TIMEOUT_S
        processes: list[psutil.Process] = []
        while True:
            try:
                actor: Any = ray.get_actor(role, NAMESPACE)
            except ValueError:
                break  # The name is free.
            with contextlib.suppress(RayError):
                report: Any = ray.get(actor.report.remote(), timeout=REPORT_TIMEOUT_S)
                processes += alive([report.pid])
            ray.kill(actor, no_restart=True)
            if time.monotonic() > deadline:
                raise BootFailed(f"an earlier {role} actor does not end; restart Ray")
        wait_or_kill(processes)
    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(CELL))


def alive(pids: Iterable[int]) -> list[psutil.Process]:
    """Those of the processes that still run."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    return processes


def wait_or_kill(processes: list[psutil.Process]) -> None:
    """Return when all have ended, by themselves or by force: none may write after this."""
    _, stubborn = psutil.wait_procs(processes, CHILD_EXIT_TIMEOUT_S)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # The next trainer writes where one of them did.
    psutil.wait_procs(stubborn, CHILD_EXIT_TIMEOUT_S)
