"""The parts of the door without a cluster: keys, limits, parsing, and the way to the engine.

The engine is a small real HTTP server on a real Unix socket; the client is a real ASGI exchange.
"""

import asyncio
import json
import os
import stat
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
    InvalidRequest,
    MalformedRequest,
    NotAuthenticated,
    NotPermitted,
    SettingsError,
    TooBusy,
    TooLarge,
    Unavailable,
)
from actors.posted import TrainRequest
from actors.traffic import Traffic
from actors.versions import VersionCounter
from door.exchanges import ExchangeLog, Hearing
from door.keys import KeyStore, Scope
from door.latencies import Latencies
from door.limits import Slots, parse, parse_json, read_body
from door.proxy import EngineProxy

# Keys.


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path)


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_without_keys_there_is_no_id_to_report(keys: KeyStore) -> None:
    assert keys.records() == []
    assert keys.check(None, "teach") is None


def test_use_key_may_use_and_not_teach(keys: KeyStore) -> None:
    key = keys.add("use")
    assert keys.check(bearer(key), "use") == keys.records()[0]["id"]
    with pytest.raises(NotPermitted, match="--scope teach"):
        keys.check(bearer(key), "teach")


def test_teach_key_may_do_both(keys: KeyStore) -> None:
    keys.add("use")
    key = keys.add("teach")
    scopes: tuple[Scope, ...] = ("use", "teach")
    for scope in scopes:
        assert keys.check(bearer(key), scope) == keys.records()[1]["id"]
    assert keys.check(f"bearer  {key} ", "teach") == keys.records()[1]["id"]


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer rv-wrong", "Basic {key}", "{key}", "Bearer {key}x"],
)
def test_other_header_is_not_authenticated(keys: KeyStore, header: str | None) -> None:
    key = keys.add("teach")
    with pytest.raises(NotAuthenticated, match="reverie keys add"):
        keys.check(header.format(key=key) if header else header, "use")


def test_hash_of_a_key_is_no_key(keys: KeyStore) -> None:
    keys.add("teach")
    with pytest.raises(NotAuthenticated):
        keys.check(bearer(keys.records()[0]["sha256"]), "use")


def test_key_is_hashed_at_rest_and_the_file_is_private(keys: KeyStore, tmp_path: Path) -> None:
    key = keys.add("use")
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]
    assert key.removeprefix("rv-") not in (tmp_path / "keys.json").read_text()
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600


def test_keys_change_while_serving(keys: KeyStore, tmp_path: Path) -> None:
    first = keys.add("use")
    command_line = KeyStore(tmp_path)
    second = command_line.add("use")
    first_id = keys.check(bearer(first), "use")
    assert keys.check(bearer(second), "use") != first_id
    assert command_line.remove(str(first_id))
    with pytest.raises(NotAuthenticated):
        keys.check(bearer(first), "use")
    keys.check(bearer(second), "use")
    assert not command_line.remove(str(first_id)), "it is gone already"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 2, "keys": []}', '{"keys": []}', '{"format": 1}']
)
def test_damaged_file_lets_nobody_in(keys: KeyStore, tmp_path: Path, text: str) -> None:
    key = keys.add("teach")
    (tmp_path / "keys.json").write_text(text)
    for store in (keys, KeyStore(tmp_path)):
        with pytest.raises(SettingsError, match=r"keys\.json cannot be read"):
            store.check(bearer(key), "use")


# Limits.


def test_slots_are_bounded_and_given_back() -> None:
    slots = Slots(2)
    with slots.one(), slots.one():
        with pytest.raises(TooBusy, match="2 requests"):
            slots.take()
        assert slots.taken == 2
    assert slots.taken == 0


def test_slot_is_given_back_after_an_error() -> None:
    slots = Slots(1)
    with pytest.raises(ZeroDivisionError), slots.one():
        raise ZeroDivisionError
    assert slots.taken == 0


def request_of(
    *parts: bytes, method: str = "POST", path: str = "/train", query: str = "", **headers: str
) -> Request:
    """A request whose body arrives in the given parts; reading further waits for ever."""
    left = [
        {"type": "http.request", "body": part, "more_body": at < len(parts) - 1}
        for at, part in enumerate(parts)
    ]

    async def receive() -> Any:
        return left.pop(0) if left else await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }
    return Request(scope, receive)


async def test_body_up_to_the_limit_is_read_whole() -> None:
    assert await read_body(request_of(b"12345", b"", b"67890"), 10, 10) == b"1234567890"
    assert await read_body(request_of(b""), 10, 10) == b""


async def test_declared_size_is_refused_before_anything_is_read() -> None:
    with pytest.raises(TooLarge, match="limit of 10 bytes"):
        await read_body(request_of(content_length="11"), 10, 10)  # nothing ever arrives


async def test_streamed_size_is_refused_at_the_first_byte_too_many() -> None:
    for headers in ({}, {"content_length": "5"}, {"content_length": "many"}):
        endless = request_of(b"12345", b"678901", *[b"never read"] * 3, **headers)
        with pytest.raises(TooLarge, match="limit of 10 bytes"):
            await read_body(endless, 10, 10)
        assert (await endless.receive())["body"] == b"never read"


# Parsing.


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": "\xff"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8|JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"3", "must be a JSON object"),
    ],
    ids=lambda value: str(value[:24]),
)
def test_body_that_is_no_json_object_is_malformed(body: bytes, match: str) -> None:
    with pytest.raises(MalformedRequest, match=match):
        parse_json(body)


def test_text_arrives_as_it_was_sent() -> None:
    body = '{"a": "h\u00e9 \U0001f600 \\u00e9 \\ud83d\\ude00", "b": [1, 2.5, null, true]}'.encode()
    expected = "h\u00e9 \U0001f600 \u00e9 \U0001f600"
    assert parse_json(body) == {"a": expected, "b": [1, 2.5, None, True]}


GOOD: dict[str, Any] = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
}


@pytest.mark.parametrize(
    ("samples", "where"),
    [
        ([GOOD, {"messages": [{"role": "robot", "content": "x"}]}], "samples[1].messages[0].role"),
        ([GOOD, {"messages": [{"role": "user"}]}], "samples[1].messages[0].content"),
        ([{"messages": [{"role": "user", "content": 3}]}], "samples[0].messages[0].content"),
        ([{"messages": []}], "samples[0].messages"),
        ([{"messages": "hello"}], "samples[0].messages"),
        ([GOOD | {"strip": ["robot"]}], "samples[0].strip[0]"),
        ([GOOD | {"weight": 0}], "samples[0].weight"),
        ([GOOD | {"weight": 1e999}], "samples[0].weight"),
        ([GOOD | {"id": ""}], "samples[0].id"),
        ([GOOD | {"id": "x" * 129}], "samples[0].id"),
        ([GOOD | {"sorce": "typo"}], "samples[0].sorce"),
        ([{"context": "c"}], "samples[0].continuation"),
        ([{"context": "c", "continuation": None}], "samples[0].continuation"),
        ([{"context_ids": [1], "continuation_ids": [2, -1]}], "samples[0].continuation_ids[1]"),
        ([{"context_ids": [1], "continuation_ids": ["2"]}], "samples[0].continuation_ids[0]"),
        ([GOOD | {"continuation": "both"}], "samples[0]."),
        ([{"context": "c", "continuation": "d", "continuation_ids": [1]}], "samples[0]."),
        ([GOOD, 3], "samples[1]"),
        ([GOOD, [[[]]]], "samples[1]"),
        ([], "samples"),
        ("text", "samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_sample_is_refused_with_its_path(samples: Any, where: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(TrainRequest, json.dumps({"samples": samples}).replace("Infinity", "1e999").encode())
    assert refused.value.param is not None
    if where.endswith("."):
        assert refused.value.param.startswith(where)
    else:
        assert refused.value.param == where
    assert str(refused.value).startswith(f"{refused.value.param}: ")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "samples"),
        ({"samples": [GOOD], "sample": 1}, "sample"),
        ({"samples": [GOOD], "config": {"learning_rte": 1}}, "config.learning_rte"),
        ({"samples": [GOOD], "config": {"learning_rate": -1}}, "config.learning_rate"),
        ({"samples": [GOOD], "config": {"epochs": 0}}, "config.epochs"),
        ({"samples": [GOOD], "config": {"epochs": "3"}}, "config.epochs"),
        ({"samples": [GOOD], "config": {"epochs": 1.5}}, "config.epochs"),
        ({"samples": [GOOD], "config": {"objective": "magic"}}, "config.objective"),
        ({"samples": [GOOD], "config": []}, "config"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_request_is_refused_with_its_path(body: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest, match="^" + where.replace(".", r"\.")) as refused:
        parse(TrainRequest, json.dumps(body).encode())
    assert refused.value.param == where


def test_long_value_is_shown_in_short() -> None:
    body = {"samples": [{"messages": "x" * 100_000}]}
    with pytest.raises(InvalidRequest) as refused:
        parse(TrainRequest, json.dumps(body).encode())
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"samples": [' + b"[" * 150 + b"]" * 150 + b"]}",
        b'{"samples": [' + b"[" * 600 + b"]" * 600 + b"]}",
        b'{"samples": [{"messages": [{"role": "user", "content": "\\ud800"}]}]}',
        b'{"samples": [], "\\ud800": 1}',
        b'{"samples": ' + b"9" * 400 + b"}",
    ],
    ids=["deep", "deeper", "half a character", "half a character as key", "huge number"],
)
def test_odd_body_is_the_clients_fault_and_can_be_answered(body: bytes) -> None:
    with pytest.raises((InvalidRequest, MalformedRequest)) as refused:
        parse(TrainRequest, body)
    json.dumps(str(refused.value), ensure_ascii=False).encode()


# The way to the engine.

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
