"""A real Prometheus over the file that ships: started on a free port, asked over its own API.

watched(base, folder) -> Prometheus.ask("rate(...)") -> values by their labels
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from tests.conftest import free_port

BINARY: Final = shutil.which("prometheus")
CONFIG: Final = Path(__file__).parents[1] / "observability" / "prometheus.yml"
START_TIMEOUT_S: Final = 60
STOP_TIMEOUT_S: Final = 30
LOOK_INTERVAL_S: Final = 0.25


@dataclass(frozen=True)
class Prometheus:
    base: str

    def get(self, path: str, **query: str) -> Any:
        answer = httpx.get(f"{self.base}{path}", params=query, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def ask(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The values that an expression has now, by their labels; an error in it is raised."""
        found = self.get("/api/v1/query", query=expression)["result"]
        return {tuple(sorted(each["metric"].items())): float(each["value"][1]) for each in found}

    def targets(self, job: str) -> list[dict[str, Any]]:
        """Whom it scrapes for a job, and with what result."""
        active = self.get("/api/v1/targets")["activeTargets"]
        return [each for each in active if each["labels"]["job"] == job]

    def wait(self, is_so: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, f"{what}: {self.get('/api/v1/targets')}"
            time.sleep(LOOK_INTERVAL_S)


@contextmanager
def watched(base: str, folder: Path, interval: str = "1s") -> Iterator[Prometheus]:
    """The shipped file, but for the address of the door and the interval."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"]["scrape_interval"] = interval
    (door,) = (each for each in config["scrape_configs"] if each["job_name"] == "reverie")
    door["static_configs"] = [{"targets": [base.removeprefix("http://")]}]
    path, port = folder / "prometheus.yml", free_port()
    path.write_text(yaml.safe_dump(config))
    assert BINARY is not None
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                BINARY,
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        made = Prometheus(f"http://127.0.0.1:{port}")
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _is_ready(made):
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                assert time.monotonic() < deadline, "Prometheus did not start"
                time.sleep(LOOK_INTERVAL_S)
            yield made
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(made: Prometheus) -> bool:
    try:
        return httpx.get(f"{made.base}/-/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
