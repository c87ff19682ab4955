"""The audit file: who had the model taught what, in lines that are only ever added.

    allowed, parsed --"asked" line, synced--> the act --"done" line--> answer

{"time", "request", "key", "act", "route", "state": "asked", ...ids and counts}
{"time", "request", "key", "act", "route", "state": "done", "status": 202, ...ids}

Two lines and not one: the first is durable before anything is done, so that a crash, or a disk that
fills up, leaves no act without its line. An act whose first line cannot be written is refused. One
without a second line was cut off: what became of it, the ledger says. Never texts, never keys.
"""

import asyncio
import errno
import json
import logging
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from actors.errors import ReverieError, Unrecorded

log = logging.getLogger(__name__)

NAME: Final = "audit.jsonl"
NO_KEY: Final = "no key"
MAX_BYTES: Final = 16 * 1024**2
"""Size from which a file is put aside as `audit-N.jsonl`, and a new one begun."""
MAX_FILES: Final = 16
"""Most that are put aside; the oldest goes. 272 MiB in all, some million acts."""
MAX_LISTED: Final = 32
"""Most ids in a line; the count beside them is exact."""

_ASIDE: Final = re.compile(r"audit-[0-9]{8}\.jsonl")


class Audit:
    """The file of one model's state. One ingress replica writes it, one line at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @asynccontextmanager
    async def act(
        self, folder: Path, who: Mapping[str, str], act: str, **asked: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Note an act around its doing; what is put into the dict given is noted with its end.

        Blocks on the disk once, in a thread. Raises Unrecorded, with nothing done, where the first
        line cannot be kept.
        """
        line = {**who, "act": act}
        try:
            await asyncio.to_thread(self._write, folder, line | {"state": "asked"} | asked, True)
        except OSError as error:
            raise Unrecorded(
                f"the audit file {NAME} cannot be written ({error.strerror}), and nothing is "
                "taught or undone without a line in it; make room on the disk of REVERIE_HOME"
            ) from None
        made: dict[str, Any] = {"status": None}
        try:
            yield made
        except ReverieError as error:
            made["status"] = error.status
            raise
        except Exception:
            made["status"] = 500
            raise
        finally:
            try:
                # Also where this request is cancelled meanwhile: the thread goes on.
                await asyncio.to_thread(self._write, folder, line | {"state": "done"} | made, False)
            except OSError as error:  # It was done; that it was asked is durable.
                log.warning("%s of an act is not noted: %s", made["status"], error.strerror)

    def _write(self, folder: Path, line: dict[str, Any], is_synced: bool) -> None:
        text = json.dumps({"time": round(time.time(), 3)} | line, ensure_ascii=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._lock:
            descriptor = os.open(folder / NAME, flags, 0o600)
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
                        _sync(folder)  # Its name is new.
            finally:
                os.close(descriptor)
            if size + len(data) >= MAX_BYTES:
                _put_aside(folder)


def _put_aside(folder: Path) -> None:
    """Begin a new file with the next line; the oldest of too many goes."""
    aside = sorted(path for path in folder.glob("audit-*.jsonl") if _ASIDE.fullmatch(path.name))
    number = int(aside[-1].stem.removeprefix("audit-")) + 1 if aside else 1
    (folder / NAME).rename(folder / f"audit-{number:08}.jsonl")
    for old in aside[: len(aside) + 1 - MAX_FILES]:
        old.unlink()
    _sync(folder)


def _sync(folder: Path) -> None:
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def listed(ids: list[str]) -> list[str]:
    """So many of the ids as a line may hold."""
    return ids[:MAX_LISTED]
