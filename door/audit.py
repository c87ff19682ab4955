"""The audit file: who had the model taught what, in lines that are only ever added.

    allowed, parsed --"asked" line, synced--> the act --"done" line--> answer

{"time", "request", "key", "act", "route", "state": "asked", ...ids and counts}
{"time", "request", "key", "act", "route", "state": "done", "status": 202, ...ids}

Two lines and not one: the first is durable before anything is done, so that a crash, or a disk that
fills up, leaves no act without its line. An act whose first line cannot be written is refused. One
without a second line was cut off: what became of it, the ledger says. Never texts, never keys.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from actors.errors import ReverieError, Unrecorded
from actors.line_file import LineFile

log = logging.getLogger(__name__)

NAME: Final = "audit.jsonl"
NO_KEY: Final = "no key"
MAX_BYTES: Final = 16 * 1024**2
"""Size from which a file is put aside as `audit-N.jsonl`, and a new one begun."""
MAX_FILES: Final = 16
"""Most that are put aside; the oldest goes. 272 MiB in all, some million acts."""
MAX_LISTED: Final = 32
"""Most ids in a line; the count beside them is exact."""


class Audit:
    """The file of one model's state."""

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
        file = LineFile(folder, NAME.removesuffix(".jsonl"), MAX_BYTES, MAX_FILES)
        file.add(line, is_synced=is_synced)


def listed(ids: list[str]) -> list[str]:
    """So many of the ids as a line may hold."""
    return ids[:MAX_LISTED]
