"""The one place where rsync is run: with limits, durably, and with its failures in words."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from blake3 import blake3

from actors.errors import SettingsError, Unavailable

STALL_TIMEOUT_S: Final = 120
"""rsync gives up when nothing has moved for so long."""
VANISHED: Final = 24
NOT_FOUND: Final = 23
"""rsync's exit statuses for sources that are gone, and for what could not be read."""
HASH_BLOCK_BYTES: Final = 1 << 22


class Vanished(Exception):
    """A file went while it was shipped."""


def checked(home: Path, place: str) -> str:
    """The place as rsync shall be told it; raises SettingsError for one that cannot be meant."""
    if not place.strip() or place.startswith("-"):
        raise SettingsError(f"{place!r} is no place for a mirror; give a directory or host:path")
    if "::" in place or "://" in place:
        raise SettingsError(f"{place!r}: rsync daemons have no encryption; use host:path, over ssh")
    head = place.partition("/")[0]
    if ":" in head:
        return place.rstrip("/")
    path, inside = Path(place).expanduser().resolve(), home.resolve()
    if path == inside or inside in path.parents or path in inside.parents:
        raise SettingsError(f"{place}: a mirror and REVERIE_HOME may not lie in one another")
    return str(path)


def require_rsync() -> None:
    if shutil.which("rsync") is None:
        raise SettingsError("there is no rsync; install it (Debian: apt-get install rsync)")


def rsync(
    options: list[str],
    source: str,
    destination: str,
    progress: bool = False,
    *,
    may_lack: bool = False,
) -> str:
    """Run rsync to its end; returns what it said. Raises Vanished, Unavailable."""
    command = ["rsync", "-tp", "--protect-args", "--mkpath", "--chmod=D700,F600", "--fsync"]
    command += ["--partial-dir=.partial", f"--timeout={STALL_TIMEOUT_S}", *options]
    command += ["--info=progress2"] if progress and os.isatty(1) else []
    target = destination if destination.endswith(".json") else f"{destination}/"
    done = subprocess.run(
        [*command, "--", source, target],
        stdin=subprocess.DEVNULL,
        stdout=None if progress and os.isatty(1) else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 0:
        return done.stdout or ""
    words = (done.stderr.strip().splitlines() or ["no reason given"])[0]
    is_gone = "No such file" in done.stderr or "does not exist" in done.stderr
    if done.returncode == VANISHED or (is_gone and not may_lack and done.returncode == NOT_FOUND):
        raise Vanished
    if is_gone and may_lack:
        raise FileNotFoundError(source)
    raise Unavailable(f"rsync ended with status {done.returncode}: {words}")


def hashed(path: Path) -> tuple[int, str]:
    """Size and BLAKE3; raises Vanished for a file that went."""
    hasher, size = blake3(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                hasher.update(block)
                size += len(block)
    except FileNotFoundError:
        raise Vanished from None
    return size, hasher.hexdigest()
