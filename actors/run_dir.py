"""The private directory in shared memory where one boot keeps what its processes share.

Made by the cell and removed by it; what cells that were killed left behind is removed at the next
boot. Also the lock that keeps a model in the hands of one cell.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Final

import psutil

from actors.errors import BootFailed
from actors.messages import CellPaths

SHARED_MEMORY: Final = Path("/dev/shm")
PREFIX: Final = "reverie-"
VLLM_FILES: Final = ("psm_", "sem.mp-")
"""Names that Python's multiprocessing gives to the queues between vLLM's processes."""


def lock(path: Path, model: str) -> int:
    """Hold `path` until this process ends; raises BootFailed if another cell does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BootFailed(
            f"model {model} is already being taught by another cell; stop that one first, "
            "or use another REVERIE_HOME"
        ) from None
    return descriptor


def create() -> str:
    """A fresh private directory in shared memory; what dead cells of this user left is removed."""
    prefix = f"{PREFIX}{os.getuid()}-"
    for left in SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError):  # Another cell may be removing it too.
            status = left.lstat()
            if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
                continue  # A stranger's: whatever it says, nothing is removed on its word.
            owner = (left / "owner").read_text()
            if owner and not psutil.pid_exists(int(owner)):  # Empty: it is just being made.
                remove(left)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=SHARED_MEMORY))
    (directory / "owner").write_text(str(os.getpid()))
    return str(directory)


def remove(directory: Path) -> None:
    """Free the shared memory of a boot, and what vLLM's killed processes could not free."""
    paths = CellPaths("", str(directory), "")
    with contextlib.suppress(FileNotFoundError):
        for name in Path(paths.vllm_files).read_text().split():
            left = SHARED_MEMORY / Path(name).name
            if left.name.startswith(VLLM_FILES):
                left.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
