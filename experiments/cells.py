"""A cell for an experiment: over a copy of a model, in a home of its own, gone afterwards."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from actors.home import default_home
from apollo.weights import manifest
from command import record

BOOT_TIMEOUT_S: Final = 400
STOP_TIMEOUT_S: Final = 120


def require_untaught(model: str) -> None:
    """Raises SystemExit for the directory of a model that a cell has taught: it is no base."""
    found = manifest.read(Path(model)) if Path(model).is_dir() else None
    if found is not None and found.generation:
        raise SystemExit(
            f"--model {model}: generation {found.generation} of what a cell has taught it; give "
            "the base, in a directory that no cell serves from"
        )


@contextlib.contextmanager
def running_cell(
    directory: Path, settings: Mapping[str, Any], home: Path | None = None
) -> Iterator[str]:
    """The address of a new cell over a copy of the model; ended and removed afterwards.

    With a `home` it stays there, and the next cell in that home goes on where this one was.
    """
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "command", "up", "--port", str(port)]
    command += ["--model", str(directory)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    with tempfile.TemporaryDirectory(prefix="reverie-experiment-") as passing:
        place = home or Path(passing)
        place.mkdir(parents=True, exist_ok=True)
        log = place / "log"
        with log.open("a") as out:
            process = subprocess.Popen(
                command,
                env=os.environ | {"REVERIE_HOME": str(place)},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + BOOT_TIMEOUT_S
            while not is_ready(base):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the cell did not start:\n{log.read_text()}")
                time.sleep(0.5)
            with _its_ray(place, port):
                yield base
        finally:
            end(process)


@contextlib.contextmanager
def _its_ray(home: Path, port: int) -> Iterator[None]:
    """`ray.init("auto")` is the cell's Ray, also in a job of another one."""
    found = record.read(home, port)
    assert found is not None
    its = {"RAY_ADDRESS": found.ray_address, "RAY_AUTH_MODE": found.auth_mode}
    before = {name: os.environ.get(name) for name in its}
    os.environ |= its
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def end(process: "subprocess.Popen[bytes]") -> None:
    """As Ctrl-C does, for the leader of a session; its group is killed if that takes long."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def find_ray(port: int) -> None:
    """Have `ray.init("auto")` join the cell behind a port, as a job of it does by itself.

    To be called before Ray is imported, which reads the environment once.
    """
    found = record.read(default_home(), port)
    if found is not None and found.process() is not None:
        os.environ.setdefault("RAY_ADDRESS", found.ray_address)
        os.environ.setdefault("RAY_AUTH_MODE", found.auth_mode)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(base: str) -> bool:
    try:
        return httpx.get(f"{base}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
