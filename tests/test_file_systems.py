"""Power cuts of real file systems, through the experiment that does it on all of them.

They need root and loop devices: where those are not to be had, only the refusals are tested.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[1]
SCRIPT = [sys.executable, "-m", "experiments.file_systems", "--on", "ext4"]
PROBE = """
import sys, tempfile
from pathlib import Path
from experiments.volume import Unable, Volume, enter_namespace, require
try:
    require({"ext4"})
    enter_namespace()
    with tempfile.TemporaryDirectory() as folder:
        with Volume("ext4", "defaults", Path(folder)) as volume:
            volume.unplug()
except (Unable, OSError) as error:
    sys.exit(str(error))
"""
NUM_CUTS = 10
MAX_CUTS_TO_FIND = 40
"""Of a journal that is wrong."""
BEGUN_S = 60.0


@pytest.fixture(scope="module")
def can_cut() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        pytest.skip(f"no file system can be made and cut here: {done.stderr.strip()}")


def cut(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    where = ["--folder", str(folder)]
    return subprocess.run(
        [*SCRIPT, *where, *options], cwd=ROOT, capture_output=True, text=True, timeout=250
    )


def attached(folder: Path) -> list[str]:
    """Images below a folder that a loop device still holds."""
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    return [path for path in (file.read_text() for file in files) if str(folder) in path]


def loose(folder: Path) -> Iterator[Path]:
    return folder.glob("file-systems-*")


@pytest.mark.usefixtures("can_cut")
def test_no_power_cut_loses_what_was_acknowledged_and_every_fault_is_found(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    sizes = ["--kills", "2", "--cuts", str(NUM_CUTS), "--fault-cuts", str(MAX_CUTS_TO_FIND)]
    done = cut(tmp_path, *sizes, "--json", str(found))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(found.read_text())
    here = result["file_systems"]["ext4"]
    assert {way: cuts["kills"] for way, cuts in here["cuts"].items()} == {
        "unplug": NUM_CUTS,
        "shutdown": NUM_CUTS,
    }
    assert here["full"]["commit"] >= 2 and here["full"]["publish"] >= 5, here
    missed = [name for name, each in result["faults"]["ext4"].items() if each["found"] is None]
    assert not missed, result
    assert not attached(tmp_path) and not list(loose(tmp_path))


@pytest.mark.usefixtures("can_cut")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_mounted_whatever_ends_it(tmp_path: Path, signum: int) -> None:
    command = [*SCRIPT, "--folder", str(tmp_path)]
    script = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # Whoever tests in the background ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert script.stdout is not None
        limit = time.monotonic() + BEGUN_S
        while "cuts by unplug" not in script.stdout.readline():
            assert time.monotonic() < limit
        assert attached(tmp_path)
        script.send_signal(signum)
        script.wait(timeout=60)
    finally:
        script.kill()
        script.wait()
    limit = time.monotonic() + BEGUN_S
    while attached(tmp_path):  # Its child may live for an instant longer.
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert not list(loose(tmp_path)) or signum == signal.SIGKILL


def test_a_missing_tool_is_named_with_its_package(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        SCRIPT, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Debian has it in the package" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_only_root_is_let_in(tmp_path: Path) -> None:
    tools = ["mount", "mkfs.ext4"]
    for tool in tools:
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    ask = "import os; os.geteuid = lambda: 1000; from experiments.volume import require; "
    done = subprocess.run(
        [sys.executable, "-c", ask + "require({'ext4'})"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Unable: only root can mount a file" in done.stderr, done.stderr
