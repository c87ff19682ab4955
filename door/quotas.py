"""What each key has used: requests in the last minute and at once, tokens and samples of the day.

    _allow --enter--> Meter --> OverQuota (429, Retry-After)
    answer --Tally: bytes that pass--> tokens of the day --every WRITE_INTERVAL_S--> usage.json

Counted in memory, by the one ingress replica that a cell has; a second one would count for itself.
A restart forgets the last minute, and of the day at most what the last WRITE_INTERVAL_S brought.
"""

import asyncio
import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from actors.errors import OverQuota, ReverieError, Unrecorded
from door.keys import DAY_S, Quotas

log = logging.getLogger(__name__)

WRITE_INTERVAL_S: Final = 5.0
"""Time between two writes of what was used: no request waits for the disk."""
MINUTE_S: Final = 60.0
BYTES_PER_TOKEN: Final = 4
"""Of a question whose answer names no usage."""
FORMAT: Final = 1
_TOTAL: Final = re.compile(rb'"total_tokens": ?([0-9]{1,12})')
_EVENT: Final = b"data: "
_OVERLAP: Final = 32
"""Bytes of a chunk that are looked at again with the next: more than what is looked for."""

Clock = Callable[[], float]


class Meter:
    """Uses of all keys of one `REVERIE_HOME`."""

    def __init__(self, home: Path, clock: Clock = time.time, minutes: Clock = time.monotonic):
        self._path = home / "usage.json"
        self._clock, self._minutes = clock, minutes
        self._recent: dict[str, deque[float]] = {}
        self._ongoing: dict[str, int] = {}
        self._day, self._used = self._read()
        self._writing: asyncio.Task[None] | None = None

    def enter(self, record: Mapping[str, Any]) -> Callable[[], None]:
        """Count a request of a key; returns what its end calls. Raises OverQuota."""
        key, quotas = str(record["id"]), quotas_of(record)
        ongoing = self._ongoing.get(key, 0)
        if quotas.ongoing is not None and ongoing >= quotas.ongoing:
            raise _over("ongoing", quotas.ongoing, 1)
        self._check_day(key, "tokens_per_day", quotas.tokens_per_day)
        if quotas.requests_per_minute is not None:
            recent, now = self._recent.setdefault(key, deque()), self._minutes()
            while recent and now - recent[0] >= MINUTE_S:
                recent.popleft()
            if len(recent) >= quotas.requests_per_minute:
                again_s = MINUTE_S - (now - recent[0])
                raise _over("requests_per_minute", quotas.requests_per_minute, again_s)
            recent.append(now)
        self._ongoing[key] = ongoing + 1

        def leave() -> None:
            self._ongoing[key] -= 1
            if not self._ongoing[key]:
                del self._ongoing[key]

        return leave

    @contextmanager
    def samples(self, record: Mapping[str, Any] | None, num: int) -> Iterator[None]:
        """Count samples while they are being accepted: not those that were refused.

        Raises OverQuota before anything is done.
        """
        if record is None or (limit := quotas_of(record).samples_per_day) is None:
            yield
            return
        key = str(record["id"])
        if self.used(key, "samples_per_day") + num > limit:
            raise _over("samples_per_day", limit, self._until_tomorrow())
        self._add(key, "samples_per_day", num)
        try:
            yield
        except ReverieError as error:
            # After other errors they may have been accepted all the same.
            if error.status < 500 or isinstance(error, Unrecorded):
                self._add(key, "samples_per_day", -num)
            raise

    def tally(self, record: Mapping[str, Any] | None, body: bytes) -> "Tally | None":
        """What counts the tokens of an answer, if the key has a quota of them.

        An answer that was begun is finished: the last ones of a day may go beyond the quota.
        """
        if record is None or quotas_of(record).tokens_per_day is None:
            return None
        key = str(record["id"])
        return Tally(len(body), lambda num: self._add(key, "tokens_per_day", num))

    def used(self, key: str, quota: str) -> int:
        """What a key has used of a day's quota, today."""
        today = int(self._clock() // DAY_S)
        if today != self._day:
            self._day, self._used = today, {}
        return self._used.get(key, {}).get(quota, 0)

    def _check_day(self, key: str, quota: str, limit: int | None) -> None:
        if limit is not None and self.used(key, quota) >= limit:
            raise _over(quota, limit, self._until_tomorrow())

    def _until_tomorrow(self) -> float:
        return DAY_S - self._clock() % DAY_S

    def _add(self, key: str, quota: str, num: int) -> None:
        before = self.used(key, quota)
        self._used.setdefault(key, {})[quota] = max(0, before + num)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write_later())

    # On disk: a small file of ids and numbers.

    async def _write_later(self) -> None:
        await asyncio.sleep(WRITE_INTERVAL_S)
        await asyncio.to_thread(self.write)

    def write(self) -> None:
        """Keep what was used today; a disk that takes nothing is only reported."""
        text = json.dumps({"format": FORMAT, "day": self._day, "used": dict(self._used)})
        partial = self._path.with_suffix(".partial")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        try:
            with os.fdopen(os.open(partial, flags, 0o600), "w") as file:
                file.write(text)
            partial.rename(self._path)
        except OSError as error:
            log.warning("usage.json is not written (%s); a restart forgets it", error.strerror)

    def _read(self) -> tuple[int, dict[str, dict[str, int]]]:
        today = int(self._clock() // DAY_S)
        try:
            stored = json.loads(self._path.read_text())
            if stored["format"] != FORMAT or stored["day"] != today:
                return today, {}
            return today, {
                str(key): {str(quota): int(num) for quota, num in used.items()}
                for key, used in stored["used"].items()
            }
        except FileNotFoundError:
            return today, {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("usage.json cannot be read; today is counted from nothing")
            return today, {}


class Tally:
    """Tokens of one exchange, from the bytes of its answer.

    vLLM's own count (`usage`) where the answer has one: every answer that is no stream, and streams
    that were asked for it (`stream_options.include_usage`). Else its events, of which vLLM sends
    one per token unless it falls behind, and a token for every BYTES_PER_TOKEN of the question.
    """

    def __init__(self, body_bytes: int, count: Callable[[int], None]) -> None:
        self._asked = body_bytes // BYTES_PER_TOKEN
        self._count = count
        self._named: int | None = None
        self._events = 0
        self._end = b""

    def take(self, part: bytes) -> None:
        """The next bytes of the answer."""
        text = self._end + part
        # The largest: a client may have had an object of that name repeated in the answer.
        named = [int(found) for found in _TOTAL.findall(text)]
        self._named = max([*named, self._named or 0]) if named else self._named
        self._events += text.count(_EVENT) - self._end.count(_EVENT)
        self._end = text[-_OVERLAP:]

    def end(self, is_stream: bool) -> None:
        """The answer has ended, whole or not."""
        if self._named is not None:
            self._count(self._named)
        elif is_stream:
            self._count(self._asked + self._events)


def quotas_of(record: Mapping[str, Any]) -> Quotas:
    """What a key may use."""
    return Quotas(**record.get("quotas", {}))


def _over(quota: str, limit: int, again_s: float) -> OverQuota:
    what = quota.replace("_", " ")
    error = OverQuota(f"this key has used its {limit} {what}; try again later, or ask for more")
    error.about(quota).again_in(again_s)
    return error
