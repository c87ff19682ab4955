"""Ray that comes up too slowly is started once more, without what is left of it."""

import subprocess
import sys
from typing import Any

import psutil
import pytest

from actors.errors import BootFailed
from command.up import NUM_RAY_STARTS, Clock, begin_ray

SLOW = "The current node timed out during startup.\nThis could happen because"


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


class Ray:
    """Starts a process each time, and fails so many times."""

    def __init__(self, num_failures: int) -> None:
        self.left = num_failures
        self.processes: list[subprocess.Popen[bytes]] = []

    def begin(self) -> Any:
        self.processes.append(sleeper())
        if self.left:
            self.left -= 1
            raise Exception(SLOW)
        return len(self.processes)


def test_a_slow_start_is_tried_again_and_nothing_of_it_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray = Ray(num_failures=2)
    other = sleeper()
    try:
        assert begin_ray(ray.begin, Clock()) == 3
        assert [psutil.pid_exists(each.pid) for each in ray.processes] == [False, False, True]
        assert other.poll() is None, "what ran before is not Ray's"
        assert capsys.readouterr().out.count("timed out during startup.; once more") == 2
    finally:
        for process in (ray.processes[-1], other):
            process.kill()
            process.wait()


def test_it_is_not_tried_for_ever() -> None:
    ray = Ray(num_failures=NUM_RAY_STARTS)
    with pytest.raises(BootFailed, match=r"did not start: The current node timed out during .*\.;"):
        begin_ray(ray.begin, Clock())
    assert len(ray.processes) == NUM_RAY_STARTS


def test_a_cluster_that_is_not_there_is_an_error_at_once() -> None:
    def begin() -> None:
        raise ConnectionError("no cluster")

    with pytest.raises(ConnectionError, match="no cluster"):
        begin_ray(begin, Clock())
