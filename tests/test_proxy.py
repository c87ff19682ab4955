"""The way to the engine: byte for byte, with its versions, whoever leaves or dies.

The engine is a small real HTTP server on a real Unix socket; the client is a real ASGI exchange.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from starlette.exceptions import HTTPException
from starlette.requests import Request

from actors.dream.exchange import Exchange
from actors.errors import (
    Unavailable,
)
from actors.traffic import Traffic
from actors.versions import VersionCounter
from door.exchanges import ExchangeLog, Hearing
from door.latencies import Latencies
from door.limits import read_body
from door.proxy import EngineProxy
from tests.asgi import request_of

VERSIONS_FIRST, VERSIONS_LAST = 7, 9


@dataclass
class Upstream:
    """What stands for vLLM: answers as told, and notes what it was asked."""

    socket: str
    versions: VersionCounter
    traffic: Traffic
    is_well: bool = True
    seen: list[web.Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response(status=200 if self.is_well else 503)
        self.seen.append(request)
        self.bodies.append(await request.read())
        assert self.answer is not None
        try:
            return await self.answer(request)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted.set()
            raise


@pytest.fixture
async def upstream(tmp_path: Path) -> AsyncIterator[Upstream]:
    versions = VersionCounter.create(str(tmp_path / "versions"))
    versions.weights_version = VERSIONS_FIRST
    traffic = Traffic.create(str(tmp_path / "traffic"))
    upstream = Upstream(str(tmp_path / "engine.sock"), versions, traffic)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", upstream.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, upstream.socket).start()
    yield upstream
    await runner.cleanup()


@pytest.fixture
async def proxy(upstream: Upstream) -> AsyncIterator[EngineProxy]:
    proxy = EngineProxy(upstream.socket, 20, upstream.versions, upstream.traffic, Latencies())
    yield proxy
    await proxy.close()


@dataclass
class Done:
    """Counts how often the slot was given back."""

    calls: int = 0

    def __call__(self) -> None:
        self.calls += 1


@dataclass
class Client:
    """The ASGI side of a client: gets what is sent, and can go away."""

    left: asyncio.Event = field(default_factory=asyncio.Event)
    messages: list[Any] = field(default_factory=list)
    got_some: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.body" and message["body"]:
            self.got_some.set()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.messages[1:])

    @property
    def is_complete(self) -> bool:
        return self.messages[-1].get("more_body", False) is False and len(self.messages) > 1


async def exchange(proxy: EngineProxy, request: Request, done: Done) -> Client:
    client = Client()
    response = await proxy.forward(request, await read_body(request, 10**6, 10), done)
    await response(request.scope, client.receive, client.send)
    return client


def events(*chunks: bytes) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await stream.prepare(request)
        for chunk in chunks:
            await stream.write(chunk)
            await asyncio.sleep(0)
        await stream.write_eof()
        return stream

    return answer


async def test_bytes_and_headers_pass_unchanged(upstream: Upstream, proxy: EngineProxy) -> None:
    body, answer = bytes(range(256)) * 40, os.urandom(5000)

    async def reply(request: web.Request) -> web.Response:
        upstream.versions.weights_version = VERSIONS_LAST
        headers = {"content-type": "application/x-odd", "x-request-id": "r1", "server": "secret"}
        return web.Response(body=answer, status=418, headers=headers)

    upstream.answer, done = reply, Done()
    request = request_of(
        body,
        path="/v1/some/route",
        query="a=1&b=%20x&a=2",
        content_type="application/json",
        authorization="Bearer rv-secret",
        x_request_id="r1",
        cookie="secret",
    )
    client = await exchange(proxy, request, done)
    assert (client.status, client.body, done.calls) == (418, answer, 1)
    assert client.headers["content-type"] == "application/x-odd"
    assert client.headers["x-request-id"] == "r1"
    assert client.headers["content-length"] == "5000"
    assert client.headers["x-weights-version"] == str(VERSIONS_FIRST)
    assert client.headers["x-weights-version-last"] == str(VERSIONS_LAST)
    assert "server" not in client.headers
    (seen,) = upstream.seen
    assert (seen.method, seen.path, upstream.bodies) == ("POST", "/v1/some/route", [body])
    assert list(seen.query.items()) == [("a", "1"), ("b", " x"), ("a", "2")]
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["x-request-id"] == "r1"
    assert "authorization" not in seen.headers and "cookie" not in seen.headers


async def test_answer_during_a_step_names_the_version_in_the_making(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    upstream.versions.begin_writing()
    upstream.answer = events(b"data: 1\n\n")
    client = await exchange(proxy, request_of(b"{}"), Done())
    comment = f": weights_version first={VERSIONS_FIRST} last={VERSIONS_FIRST + 1}\n\n".encode()
    assert client.body.endswith(comment)


async def test_get_has_no_body(upstream: Upstream, proxy: EngineProxy) -> None:
    async def reply(request: web.Request) -> web.Response:
        return web.Response(body=b"{}", content_type="application/json")

    upstream.answer, done = reply, Done()
    client = await exchange(proxy, request_of(b"", method="GET", path="/v1/models"), done)
    assert (client.status, client.body, done.calls) == (200, b"{}", 1)
    assert upstream.seen[0].method == "GET" and not upstream.seen[0].body_exists


async def test_stream_passes_unchanged_and_ends_with_both_versions(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    chunks = [b'data: {"a": "\xc3', b'\xa9"}\n\n', b"data: [DONE]\n\n"]

    async def reply(request: web.Request) -> web.StreamResponse:
        stream = await events(*chunks)(request)
        upstream.versions.weights_version = VERSIONS_LAST
        return stream

    upstream.answer, done = reply, Done()
    client = await exchange(proxy, request_of(b"{}"), done)
    comment = f": weights_version first={VERSIONS_FIRST} last={VERSIONS_LAST}\n\n".encode()
    assert client.body == b"".join(chunks) + comment
    assert client.status == 200 and client.is_complete and done.calls == 1
    assert client.headers["x-weights-version"] == str(VERSIONS_FIRST)
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in client.headers
    assert "x-weights-version-last" not in client.headers, "it is not known yet"


class Clock:
    """The proxy's, which goes on only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ms = 0
        monkeypatch.setattr(
            "door.proxy.time", SimpleNamespace(monotonic_ns=lambda: self.ms * 1_000_000)
        )


@pytest.mark.parametrize("status", [200, 400])
async def test_the_waits_between_the_tokens_of_a_stream_are_noted(
    upstream: Upstream, proxy: EngineProxy, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one after a chat's first piece, nor those before its end, nor those of an error."""
    clock, client = Clock(monkeypatch), Client()

    async def reply(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(status=status, headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        for wait_ms, piece in ((5, b"role"), (7, b"one"), (30, b"two"), (60, b"three")):
            clock.ms += wait_ms
            client.got_some.clear()
            await stream.write(b"data: " + piece + b"\n\n")
            await client.got_some.wait()
        clock.ms += 90
        await stream.write(b"data: [DONE]\n\n")
        await stream.write_eof()
        return stream

    upstream.answer = reply
    request = request_of(b"{}")
    await (await proxy.forward(request, b"{}", Done()))(request.scope, client.receive, client.send)
    assert client.is_complete and b"three" in client.body
    assert upstream.traffic.gaps_ms(0) == ([30, 60] if status == 200 else [])


async def test_a_client_that_reads_slowly_is_no_late_answer(
    upstream: Upstream, proxy: EngineProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    class Slow(Client):
        async def send(self, message: Any) -> None:
            clock.ms += 200
            await super().send(message)

    async def reply(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        for piece in (b"role", b"one", b"two"):
            client.got_some.clear()
            await stream.write(b"data: " + piece + b"\n\n")
            await client.got_some.wait()
        await stream.write_eof()
        return stream

    upstream.answer, request, client = reply, request_of(b"{}"), Slow()
    await (await proxy.forward(request, b"{}", Done()))(request.scope, client.receive, client.send)
    assert client.is_complete and upstream.traffic.gaps_ms(0) == [0]


async def test_stream_is_not_held_back(upstream: Upstream, proxy: EngineProxy) -> None:
    go_on = asyncio.Event()

    async def reply(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(b"data: 1\n\n")
        await go_on.wait()
        await stream.write(b"data: 2\n\n")
        return stream

    upstream.answer, done, client = reply, Done(), Client()
    request = request_of(b"{}")
    response = await proxy.forward(request, b"{}", done)
    sending = asyncio.create_task(response(request.scope, client.receive, client.send))
    await asyncio.wait_for(client.got_some.wait(), 10)
    assert client.body == b"data: 1\n\n" and done.calls == 0
    go_on.set()
    await asyncio.wait_for(sending, 10)
    assert client.body.startswith(b"data: 1\n\ndata: 2\n\n: weights_version")
    assert done.calls == 1


@pytest.mark.parametrize("is_silent", [False, True], ids=["amid chunks", "amid silence"])
async def test_client_that_leaves_ends_the_engines_work(
    upstream: Upstream, proxy: EngineProxy, is_silent: bool
) -> None:
    async def reply(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        while True:
            await stream.write(b"data: x\n\n")
            await (asyncio.Event().wait() if is_silent else asyncio.sleep(0.002))

    upstream.answer, done, client = reply, Done(), Client()
    request = request_of(b"{}")
    response = await proxy.forward(request, b"{}", done)
    sending = asyncio.create_task(response(request.scope, client.receive, client.send))
    await asyncio.wait_for(client.got_some.wait(), 10)
    client.left.set()
    await asyncio.wait_for(sending, 10)
    await asyncio.wait_for(upstream.aborted.wait(), 10)
    assert done.calls == 1


async def test_client_that_leaves_before_a_whole_answer_ends_the_engines_work(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    """Serve cancels the handler of a request whose client has gone."""
    has_begun = asyncio.Event()

    async def reply(request: web.Request) -> web.StreamResponse:
        has_begun.set()
        await asyncio.Event().wait()
        return web.Response()

    upstream.answer, done = reply, Done()
    asking = asyncio.create_task(proxy.forward(request_of(b"{}"), b"{}", done))
    await asyncio.wait_for(has_begun.wait(), 10)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(upstream.aborted.wait(), 10)
    assert done.calls == 0, "the door itself gives the slot of what it did not pass on"


async def test_cancelled_stream_gives_its_slot_back_once(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    async def reply(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(b"data: x\n\n")
        await asyncio.Event().wait()
        return stream

    upstream.answer, done, client = reply, Done(), Client()
    request = request_of(b"{}")
    response = await proxy.forward(request, b"{}", done)
    sending = asyncio.create_task(response(request.scope, client.receive, client.send))
    await asyncio.wait_for(client.got_some.wait(), 10)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    await asyncio.wait_for(upstream.aborted.wait(), 10)
    assert done.calls == 1


async def test_engine_that_dies_amid_a_stream_cuts_it_and_gives_the_slot_back_once(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    async def reply(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(b"data: x\n\n")
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.abort()
        await asyncio.Event().wait()
        return stream

    upstream.answer, done, client = reply, Done(), Client()
    request = request_of(b"{}")
    response = await proxy.forward(request, b"{}", done)
    with pytest.raises(Exception, match="payload|disconnect|reset|closed"):
        await response(request.scope, client.receive, client.send)
    assert client.body == b"data: x\n\n" and not client.is_complete
    assert done.calls == 1


async def test_send_that_fails_gives_the_slot_back_once(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    upstream.answer, done, client = events(b"data: x\n\n"), Done(), Client()
    request = request_of(b"{}")
    response = await proxy.forward(request, b"{}", done)

    async def send(message: Any) -> None:
        raise OSError("broken pipe")

    with pytest.raises(OSError, match="broken pipe"):
        await response(request.scope, client.receive, send)
    assert done.calls == 1


# What is logged of it.


class Heard(ExchangeLog):
    """Keeps what it is offered."""

    def __init__(self) -> None:
        super().__init__(True, self._never)
        self.exchanges: list[Exchange] = []

    async def _never(self, batch: tuple[Exchange, ...]) -> int:
        raise AssertionError("nothing is sent here")

    def offer(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)

    def hearing(self) -> Hearing:
        return Hearing(self, b"{}", may_teach=False)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_whole_answer_is_heard_as_the_client_got_it(
    upstream: Upstream, proxy: EngineProxy, is_stream: bool
) -> None:
    async def reply(request: web.Request) -> web.Response:
        return web.Response(body=b"data: 1\n\ndata: [DONE]\n\n")

    upstream.answer = events(b"data: 1\n\n", b"data: [DONE]\n\n") if is_stream else reply
    heard, client, request = Heard(), Client(), request_of(b"{}")
    response = await proxy.forward(request, b"{}", Done(), heard.hearing())
    await response(request.scope, client.receive, client.send)
    (only,) = heard.exchanges
    assert (only.answer, only.is_stream) == (b"data: 1\n\ndata: [DONE]\n\n", is_stream)
    assert client.body.startswith(only.answer)
    assert (only.first_version, only.last_version) == (VERSIONS_FIRST, VERSIONS_FIRST)


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_an_answer_is_heard_although_its_client_hung_up_on_its_last_event(
    upstream: Upstream, proxy: EngineProxy, is_cancelled: bool
) -> None:
    """As the official client does; Serve then cancels the request, or says that it has gone."""

    async def reply(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(b"data: 1\n\ndata: [DONE]\n\n")
        await asyncio.Event().wait()
        return stream

    upstream.answer = reply
    heard, client, request, done = Heard(), Client(), request_of(b"{}"), Done()
    response = await proxy.forward(request, b"{}", done, heard.hearing())
    sending = asyncio.create_task(response(request.scope, client.receive, client.send))
    await asyncio.wait_for(client.got_some.wait(), 10)
    if is_cancelled:
        sending.cancel()
    else:
        client.left.set()
    await asyncio.wait([sending], timeout=10)
    (only,) = heard.exchanges
    assert only.answer == b"data: 1\n\ndata: [DONE]\n\n" and done.calls == 1


@pytest.mark.parametrize("why", ["refused", "client gone", "engine gone"])
async def test_an_answer_that_is_not_whole_is_not_heard(
    upstream: Upstream, proxy: EngineProxy, why: str
) -> None:
    async def reply(request: web.Request) -> web.StreamResponse:
        if why == "refused":
            return web.json_response({"error": {"message": "too long"}}, status=400)
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(b"data: x\n\n")
        await asyncio.sleep(0.05)
        if why == "engine gone":
            assert request.transport is not None
            request.transport.abort()
        await asyncio.Event().wait()
        return stream

    upstream.answer = reply
    heard, client, request = Heard(), Client(), request_of(b"{}")
    response = await proxy.forward(request, b"{}", Done(), heard.hearing())
    sending = asyncio.create_task(response(request.scope, client.receive, client.send))
    if why == "client gone":
        await asyncio.wait_for(client.got_some.wait(), 10)
        client.left.set()
    await asyncio.wait([sending], timeout=10)
    assert sending.done() and (sending.exception() is not None) is (why == "engine gone")
    assert heard.exchanges == []


async def refusal_of(proxy: EngineProxy, done: Done) -> Unavailable:
    request = request_of(b"{}")
    with pytest.raises(Unavailable) as refused:
        await proxy.forward(request, b"{}", done)
    assert done.calls == 0, "whoever called still holds the slot"
    return refused.value


async def test_engine_that_is_gone_is_unavailable(upstream: Upstream, tmp_path: Path) -> None:
    socket, done = str(tmp_path / "none.sock"), Done()
    proxy = EngineProxy(socket, 20, upstream.versions, upstream.traffic, Latencies())
    assert "restarts by itself" in str(await refusal_of(proxy, done))
    with pytest.raises(Unavailable):
        await proxy.fetch("/metrics")
    await proxy.close()


async def test_engine_that_hangs_up_before_an_answer_is_unavailable(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    async def reply(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    upstream.answer, done = reply, Done()
    assert "went away" in str(await refusal_of(proxy, done))


async def test_engine_that_dies_before_the_first_chunk_is_unavailable(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    async def reply(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        await asyncio.sleep(0.02)
        assert request.transport is not None
        request.transport.abort()
        await asyncio.Event().wait()
        return stream

    upstream.answer, done = reply, Done()
    assert "went away" in str(await refusal_of(proxy, done))


async def test_engine_that_does_not_answer_in_time_is_unavailable(upstream: Upstream) -> None:
    async def reply(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        return web.Response()

    upstream.answer, done = reply, Done()
    proxy = EngineProxy(upstream.socket, 0.05, upstream.versions, upstream.traffic, Latencies())
    assert "time limit" in str(await refusal_of(proxy, done))
    await proxy.close()


async def test_500_of_a_dead_engine_is_unavailable_and_of_a_live_one_is_passed_on(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    async def reply(request: web.Request) -> web.Response:
        return web.Response(status=500, body=b"boom")

    upstream.answer, done = reply, Done()
    client = await exchange(proxy, request_of(b"{}"), done)
    assert (client.status, client.body, done.calls) == (500, b"boom", 1)
    upstream.is_well, done = False, Done()
    assert "engine died" in str(await refusal_of(proxy, done))


async def test_unknown_route_of_the_engine_is_left_to_the_door(
    upstream: Upstream, proxy: EngineProxy
) -> None:
    async def reply(request: web.Request) -> web.Response:
        return web.json_response({"detail": "Method Not Allowed"}, status=405)

    upstream.answer, done = reply, Done()
    with pytest.raises(HTTPException) as refused:
        await proxy.forward(request_of(b""), b"", done)
    assert (refused.value.status_code, done.calls) == (405, 0)


async def test_fetch_gives_the_body(upstream: Upstream, proxy: EngineProxy) -> None:
    async def reply(request: web.Request) -> web.Response:
        return web.Response(body=b"metric 1\n")

    upstream.answer = reply
    assert await proxy.fetch("/metrics") == b"metric 1\n"
