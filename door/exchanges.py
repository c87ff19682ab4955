"""Chats on their way to the dream actor, where the cell or the client wants them logged.

    _pass --hear--> Hearing <--take, end-- proxy        (bytes, as they are passed on)
                       |
                     queue (bounded) --> one sender --> the dream actor

Nobody waits for this: what does not fit, or cannot be delivered, is dropped and counted.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request

from actors.dream.exchange import Exchange
from actors.errors import InvalidRequest

log = logging.getLogger(__name__)

HEADER: Final = "x-reverie-log"
CHAT_PATH: Final = "/v1/chat/completions"
MAX_BYTES: Final = 256 * 1024
"""Most of a request, and most of an answer: a streamed token takes about 250 bytes."""
MAX_WAITING: Final = 64
"""Most exchanges between the end of their answers and the dream actor."""
MAX_AT_ONCE: Final = 8
"""Most in one message: 4 MiB."""

Send = Callable[[tuple[Exchange, ...]], Awaitable[int]]
"""Delivers exchanges; returns how many were kept."""


class ExchangeLog:
    """What is logged, and how much of it was."""

    def __init__(self, is_on: bool, send: Send) -> None:
        self._is_on, self._send = is_on, send
        self._waiting: asyncio.Queue[Exchange] = asyncio.Queue(MAX_WAITING)
        self._sending: asyncio.Task[None] | None = None
        self.kept = 0
        self.passed_over = 0
        """Delivered, and not kept: nothing could be learned of them."""
        self.dropped = 0

    def hear(
        self, request: Request, body: bytes, may_teach: Callable[[Request], bool]
    ) -> "Hearing | None":
        """What takes the answer, if this request is to be logged; raises InvalidRequest."""
        given = request.headers.get(HEADER)
        if given not in (None, "on", "off"):
            raise InvalidRequest(f"{HEADER}: {given[:40]!r}; send on or off").about(HEADER)
        is_chat = request.method == "POST" and request.url.path == CHAT_PATH
        is_on = given == "on" or (given is None and self._is_on)
        return Hearing(self, body, may_teach(request)) if is_on and is_chat else None

    def offer(self, exchange: Exchange) -> None:
        """Take it if there is room; never waits."""
        if self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send_on())
        try:
            self._waiting.put_nowait(exchange)
        except asyncio.QueueFull:
            self.dropped += 1

    async def _send_on(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < MAX_AT_ONCE and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                kept = await self._send(tuple(batch))
            except Exception as error:  # Whatever it was: the next ones must still be sent.
                log.warning("%d exchanges are lost: %s", len(batch), type(error).__name__)
                self.dropped += len(batch)
            else:
                self.kept += kept
                self.passed_over += len(batch) - kept


class Hearing:
    """One exchange while its answer passes by; holds at most MAX_BYTES of it."""

    def __init__(self, to: ExchangeLog, body: bytes, may_teach: bool) -> None:
        self._to, self._body, self._may_teach = to, body, may_teach
        self._parts: list[bytes] = []
        self._room = MAX_BYTES

    def take(self, part: bytes) -> None:
        """The next bytes of the answer."""
        self._room -= len(part)
        if self._room >= 0:
            self._parts.append(part)
        else:
            self._parts.clear()

    def end(self, is_stream: bool, first_version: int, last_version: int) -> None:
        """The answer is whole. An answer that is cut off never gets here, and is forgotten."""
        if self._room < 0 or len(self._body) > MAX_BYTES:
            self._to.dropped += 1
            return
        answer = b"".join(self._parts)
        self._to.offer(
            Exchange(
                self._body,
                answer,
                is_stream,
                first_version,
                last_version,
                self._may_teach,
                time.time(),
            )
        )
