"""What tests share: one home for the session, the adopted default model, and one running cell."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from actors.ledger import Ledger
from apollo.weights.adopt import adopt

BOOT_TIMEOUT_S = 400
STOP_TIMEOUT_S = 90
EXIT_TIMEOUT_S = 10


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Without a cell; a test that opens it a second time finds it at ledger.sqlite."""
    with closing(Ledger(tmp_path / "ledger.sqlite")) as opened:
        yield opened


@dataclass(frozen=True)
class RunningCell:
    """A real cell: real vLLM, real Ray, the real model."""

    base: str
    home: Path
    process: subprocess.Popen[str] | None = None

    def get(self, path: str) -> Any:
        """The JSON body of a GET that must succeed."""
        answer = httpx.get(self.base + path, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.base}/readyz", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_ready(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until the model answers and learns; fails with the reason."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.is_ready():
                return
            assert self.process is None or self.process.poll() is None, "the cell ended"
            time.sleep(0.25)
        raise AssertionError(f"not ready after {timeout_s} s")

    def train(self, body: dict[str, Any], timeout_s: float = 240) -> dict[str, Any]:
        """Post samples and wait until their job is at its end."""
        posted = httpx.post(f"{self.base}/train", json=body, timeout=60)
        assert posted.status_code == 202, posted.text
        return self.wait_job(posted.json()["job_id"], timeout_s)

    def wait_job(self, job_id: str, timeout_s: float = 240) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            job: dict[str, Any] = self.get(f"/train/jobs/{job_id}")
            if job["status"] not in ("queued", "training"):
                return job
            time.sleep(0.2)
        raise AssertionError(f"{job_id} did not end within {timeout_s} s")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What teaches the shared cell comes last: it would change what others ask of the model."""
    items.sort(key=lambda item: "untaught" in getattr(item, "fixturenames", ()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def reverie_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A REVERIE_HOME for the session; REVERIE_TEST_HOME keeps one between sessions."""
    kept = os.environ.get("REVERIE_TEST_HOME")
    return Path(kept) if kept else tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def model_dir(reverie_home: Path) -> Path:
    """The default model, adopted (some 20 s the first time). Shared: copy before changing it."""
    return adopt("smollm2-135m", reverie_home, "float32", print).directory


@pytest.fixture(scope="session")
def cell(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[RunningCell]:
    """One cell for the session, over its own copy of the model; stopped with Ctrl-C at the end.

    REVERIE_TEST_CELL names one that runs already (its home is REVERIE_HOME), which is left running.
    """
    if running := os.environ.get("REVERIE_TEST_CELL"):
        yield RunningCell(running, Path(os.environ["REVERIE_HOME"]))
        return
    with started_cell(tmp_path_factory.mktemp("cell"), request.getfixturevalue("model_dir")) as one:
        yield one


@pytest.fixture(scope="module")
def untaught(cell: RunningCell) -> None:
    """For a module that teaches: the shared cell knows what its base knows, and all is kept."""
    answer = httpx.post(f"{cell.base}/rollback", json={"generation": 0}, timeout=120)
    assert answer.status_code == 200, answer.text


@contextmanager
def started_cell(home: Path, model_dir: Path, *settings: str) -> Iterator[RunningCell]:
    """A cell of its own, with settings as `group.key=value`; stopped with Ctrl-C at the end."""
    port = free_port()
    command = [sys.executable, "-m", "command", "up", "--port", str(port)]
    for setting in settings:
        command += ["--set", setting]
    log = (home / "log").open("a")
    process = subprocess.Popen(
        [*command, "--model", str(model_dir)],
        env=os.environ | {"REVERIE_HOME": str(home)},
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    family: list[psutil.Process] = []
    cell = RunningCell(f"http://127.0.0.1:{port}", home, process)
    try:
        cell.wait_ready()
        yield cell
        last_version = cell.get("/status")["weights_version"]
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(STOP_TIMEOUT_S) == 0, (home / "log").read_text()
    except BaseException:
        print((home / "log").read_text())
        raise
    finally:
        log.close()
        if process.poll() is None:
            process.kill()
    (public,) = (home / "models").glob("[!.]*/reverie.json")
    saved = json.loads(public.read_text())["weights_version"]
    # A job that goes on may have made another step since.
    assert saved >= last_version, "the clean stop did not publish what was learned"
    _, left = psutil.wait_procs(family, EXIT_TIMEOUT_S)
    # A process that has ended but that nobody waits for, in a container without an init, is gone.
    alive = [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"still running after Ctrl-C: {alive}"
