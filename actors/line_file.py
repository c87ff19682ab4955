"""A file of JSON lines that is only ever added to, by any number of processes, and never too large.

    NAME.jsonl --grows to max_bytes--> NAME-00000001.jsonl, -00000002 ... the oldest goes

Knows nothing of what the lines say.
"""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LOCK_TIMEOUT_S: Final = 5.0
"""Longest wait for another process's line; each takes a write, and one sync at most."""
_LOCK_INTERVAL_S: Final = 0.01


@dataclass(frozen=True)
class LineFile:
    """`name`.jsonl in `folder`, readable by this user only."""

    folder: Path
    name: str
    max_bytes: int
    """Size from which the file is put aside, and a new one begun."""
    max_files: int
    """Most that are put aside."""
    lock_timeout_s: float = LOCK_TIMEOUT_S

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    def add(self, facts: Mapping[str, Any], *, is_synced: bool = False) -> None:
        """One more line, with the time; on disk when it returns if asked. Raises OSError."""
        text = json.dumps({"time": round(time.time(), 3)} | dict(facts), ensure_ascii=True)
        descriptor = self._open()
        try:
            size = os.fstat(descriptor).st_size
            # A line that was cut short is left as it is, and ended.
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = (b"\n" if is_torn else b"") + text.encode() + b"\n"
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if is_synced:
                os.fsync(descriptor)
                if size == 0:
                    _sync(self.folder)  # Its name is new.
            if size + len(data) >= self.max_bytes:
                self._put_aside()
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        """The file, locked: nobody else writes it, or puts it aside, before it is closed."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        deadline = time.monotonic() + self.lock_timeout_s
        while True:
            descriptor = os.open(self.path, flags, 0o600)
            if self._lock(descriptor):
                return descriptor
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise OSError(errno.EAGAIN, "another process keeps it locked")
            time.sleep(_LOCK_INTERVAL_S)

    def _lock(self, descriptor: int) -> bool:
        """False if another process has it locked, or has put it aside just now."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):
            return False

    def _put_aside(self) -> None:
        """Begin a new file with the next line; the oldest of too many goes."""
        ours = re.compile(rf"{re.escape(self.name)}-[0-9]{{8}}\.jsonl")
        found = self.folder.glob(f"{self.name}-*.jsonl")
        aside = sorted(path for path in found if ours.fullmatch(path.name))
        last = aside[-1].stem.removeprefix(f"{self.name}-") if aside else "0"
        self.path.rename(self.folder / f"{self.name}-{int(last) + 1:08}.jsonl")
        for old in aside[: len(aside) + 1 - self.max_files]:
            old.unlink()
        _sync(self.folder)


def _sync(folder: Path) -> None:
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
