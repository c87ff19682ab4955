"""Passes requests through to vLLM's own application on its private socket, byte for byte.

    client --> ingress replica --(pooled connections, engine.sock)--> vLLM's app

What is added: the versions of the weights that answered. Nothing is parsed, so nothing is lost.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.errors import Unavailable
from actors.traffic import NS, Traffic
from actors.versions import VersionCounter
from door.exchanges import Hearing
from door.latencies import Latencies, Pace
from door.quotas import Tally

VERSION_HEADER: Final = "x-weights-version"
LAST_VERSION_HEADER: Final = "x-weights-version-last"
CONNECT_TIMEOUT_S: Final = 5
_LAST_EVENT: Final = b"data: [DONE]\n\n"
_KEPT_REQUEST_HEADERS: Final = ("content-type", "accept", "x-request-id", "x-session-id")
_KEPT_RESPONSE_HEADERS: Final = ("content-type", "x-request-id")


class EngineProxy:
    """A client of one boot's engine; made anew when the cell restarts."""

    def __init__(
        self,
        socket: str,
        timeout_s: float,
        versions: VersionCounter,
        traffic: Traffic,
        latencies: Latencies,
    ) -> None:
        self._timeout_s, self._versions = timeout_s, versions
        self._traffic, self._latencies = traffic, latencies
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(socket, limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close all connections; what is being streamed ends."""
        await self._session.close()

    async def forward(
        self,
        request: Request,
        body: bytes,
        done: Callable[[], None],
        hearing: Hearing | None = None,
        tally: Tally | None = None,
    ) -> Response:
        """vLLM's answer, with the oldest and the newest version of what it may have read.

        The same number twice names one whole version; two numbers, a mixture of those between.

        `done` is called once, when the last byte has been sent or the client has gone; `hearing`
        is given the bytes of an answer that comes to its end, and `tally` those of every answer.
        Raises Unavailable if the engine is gone before it answered anything.
        """
        first = self._versions.weights_version
        pace = self._latencies.pace(self._versions)
        answer: aiohttp.ClientResponse | None = None
        try:
            answer = await self._session.request(
                request.method,
                f"http://engine{request.url.path}",
                params=request.query_params.multi_items(),
                data=body or None,
                headers=_kept(request.headers, _KEPT_REQUEST_HEADERS),
            )
            is_stream = answer.content_type == "text/event-stream"
            # A stream is only announced as 200 when its first bytes are here.
            chunk = await (answer.content.readany() if is_stream else answer.read())
            if answer.status == 500 and not await self._is_engine_well():
                raise Unavailable("the engine died; it restarts by itself, try again")
        except BaseException as error:
            if answer is not None:
                answer.close()  # Also when our own client has gone: vLLM aborts the request.
            if isinstance(error, TimeoutError):
                raise Unavailable("the engine did not answer within the time limit") from None
            if isinstance(error, aiohttp.ClientError):
                raise Unavailable(
                    "the engine went away; it restarts by itself, try again"
                ) from None
            raise
        if answer.status in (404, 405) and chunk.startswith(b'{"detail":'):
            # No such route of vLLM; that is the one error which it does not word as OpenAI does.
            raise HTTPException(answer.status, headers=_kept(answer.headers, ("allow",)))
        headers = _kept(answer.headers, _KEPT_RESPONSE_HEADERS)
        headers[VERSION_HEADER] = str(first)
        if answer.status != 200:
            hearing = tally = None
        if is_stream:
            if answer.status == 200:
                pace.first()
            watched = (self._versions, self._traffic, pace)
            return _Stream(answer, chunk, headers, *watched, done, hearing, tally, self._timeout_s)
        last = self._versions.newest_version
        headers[LAST_VERSION_HEADER] = str(last)
        response = Response(chunk, answer.status, headers)
        if tally is not None:
            tally.take(chunk)
            tally.end(False)
        if hearing is not None:
            hearing.take(chunk)
            hearing.end(False, first, last)
        done()
        return response

    async def _is_engine_well(self) -> bool:
        """Whether vLLM's front end still has its engine process; without it, it answers 500."""
        async with self._session.get("http://engine/health") as answer:
            return answer.status == 200

    async def fetch(self, path: str) -> bytes:
        """The body of one of vLLM's own GET routes."""
        try:
            async with self._session.get(f"http://engine{path}") as answer:
                return await answer.read()
        except (aiohttp.ClientError, TimeoutError):
            raise Unavailable("the engine does not answer") from None


class _Stream(Response):
    """An event stream passed on as it comes; ends with a comment that names both versions."""

    def __init__(
        self,
        answer: aiohttp.ClientResponse,
        chunk: bytes,
        headers: dict[str, str],
        versions: VersionCounter,
        traffic: Traffic,
        pace: Pace,
        done: Callable[[], None],
        hearing: Hearing | None,
        tally: Tally | None,
        timeout_s: float,
    ) -> None:
        super().__init__(None, answer.status, headers)
        del self.headers["content-length"]
        self._answer, self._chunk, self._versions, self._done = answer, chunk, versions, done
        self._traffic, self._pace = traffic, pace
        self._hearing, self._tally, self._timeout_s = hearing, tally, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        # Ends the wait for a chunk too: an engine that is silent must not outlive its client.
        gone.add_done_callback(lambda _: self._answer.close())
        first, is_whole = self.headers[VERSION_HEADER], False
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            chunk = self._chunk
            # A client that reads too slowly is cut off, as an engine that writes too slowly is.
            async with asyncio.timeout(self._timeout_s):
                while chunk and not gone.done():
                    if self._hearing is not None:
                        self._hearing.take(chunk)
                    if self._tally is not None:
                        self._tally.take(chunk)
                    is_whole = chunk.endswith(_LAST_EVENT)  # Many clients hang up on it.
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    asked_ns = time.monotonic_ns()  # A client that reads slowly is no late answer.
                    chunk = await self._answer.content.readany()
                    waited_ns = time.monotonic_ns() - asked_ns
                    is_token = self.status_code == 200 and chunk and not chunk.endswith(_LAST_EVENT)
                    if is_token and self._pace.gap(waited_ns / NS):
                        self._traffic.note_gap(waited_ns)
                is_whole = is_whole or not chunk
                last = self._versions.newest_version
                comment = f": weights_version first={first} last={last}\n\n".encode()
                await send({"type": "http.response.body", "body": comment})
        except aiohttp.ClientError:
            if not gone.done():
                raise
        finally:
            if self._tally is not None:
                self._tally.end(True)
            if self._hearing is not None and is_whole:
                self._hearing.end(True, int(first), self._versions.newest_version)
            gone.cancel()
            self._answer.close()  # If it is not at its end, vLLM aborts the request.
            self._done()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _kept(headers: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: headers[name] for name in names if name in headers}
