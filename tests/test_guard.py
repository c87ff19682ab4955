"""What no request may have and every answer has: sizes, other origins, headers, slow bodies."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import serve_app
from door.guard import MAX_HEADER_BYTES, MAX_HEADERS, MAX_TARGET_BYTES
from tests.open_door import OpenDoor, client, opened, train_body

CHAT = "/v1/chat/completions"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[OpenDoor]:
    async with opened(tmp_path / "home", body_timeout_s=0.1) as made:
        yield made


@pytest.fixture
async def http(door: OpenDoor) -> AsyncIterator[httpx.AsyncClient]:
    async with client() as made:
        yield made


# Sizes.


@pytest.mark.parametrize(
    ("route", "headers"),
    [
        ("/status?" + "a" * MAX_TARGET_BYTES, {}),
        ("/train/jobs/" + "a" * MAX_TARGET_BYTES, {}),
        ("/status", {f"x-{number}": "a" for number in range(MAX_HEADERS + 1)}),
        ("/status", {"x-long": "a" * MAX_HEADER_BYTES}),
        ("/status", {"host": "127.0.0.1:8000/status?"}),
        ("/status", {"host": "[::1"}),
        ("/status", {"host": "a b"}),
        ("/status", {"host": "me@127.0.0.1"}),
    ],
    ids=["query", "path", "many headers", "long header", *("host",) * 4],
)
async def test_what_is_too_large_or_no_host_is_refused(
    http: httpx.AsyncClient, route: str, headers: dict[str, str]
) -> None:
    answer = await http.get(route, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.content) < 1000


async def test_what_is_just_small_enough_is_answered(http: httpx.AsyncClient) -> None:
    route = "/status?" + "a" * (MAX_TARGET_BYTES - len("/status") - 1)
    headers = {f"x-{number}": "a" for number in range(MAX_HEADERS - 10)}
    assert (await http.get(route, headers=headers)).status_code == 200


async def test_a_body_that_drips_is_ended_by_the_clock(door: OpenDoor) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b'{"samples": ['
        while True:
            await asyncio.sleep(0.02)
            yield b" "

    for route in ("/train", CHAT, "/behaviours/x"):
        status, body = await _sent(route, drip(), "PUT" if "behav" in route else "POST")
        assert status == 408 and b"did not arrive within 0.1 s" in body, route
    assert door._slots.taken == 0


async def _sent(route: str, parts: AsyncIterator[bytes], method: str) -> tuple[int, bytes]:
    """As a server sends a body on while it comes, which httpx's transport does not."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": await anext(parts), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {
        **{"type": "http", "method": method, "path": route, "raw_path": route.encode()},
        **{"query_string": b"", "headers": headers, "server": ("127.0.0.1", 1), "scheme": "http"},
        **{"client": ("127.0.0.1", 2), "http_version": "1.1", "root_path": ""},
    }
    await asyncio.wait_for(serve_app.app(scope, receive, send), 10)
    return sent[0]["status"], b"".join(each["body"] for each in sent[1:])


# Other origins.

FOREIGN: list[dict[str, str]] = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:9000"},
    {"origin": "http://evil.example", "sec-fetch-mode": "no-cors"},
    {"origin": "http://127.0.0.1:8000", "access-control-request-method": "POST"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
async def test_a_page_of_another_origin_gets_nothing(
    http: httpx.AsyncClient, headers: dict[str, str], method: str
) -> None:
    for route in ("/status", "/checkpoints/verify", CHAT, "/dream", "/openapi.json"):
        answer = await http.request(method, route, headers=headers)
        assert answer.status_code == 403 and "another origin" in answer.text
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:8000"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
        {"origin": "http://127.0.0.1:8000"},
    ],
    ids=str,
)
async def test_a_program_a_link_and_our_own_page_are_answered(
    http: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    assert (await http.get("/docs", headers=headers)).status_code == 200


# Headers of every answer.


async def test_every_answer_is_kept_by_nobody_and_framed_by_nobody(
    door: OpenDoor, http: httpx.AsyncClient
) -> None:
    door.dreamer._store.put_behaviour(_behaviour())
    made = door.dreamer._store.begin_round("brief", 0.7)
    asked: list[tuple[str, str, Any]] = [
        *(("GET", route, None) for route in ("/status", "/docs", "/openapi.json", "/nowhere")),
        ("GET", f"/dream/rounds/{made.id}/report", None),
        ("POST", CHAT, {"messages": [], "stream": True}),
        *(("POST", route, {"messages": []}) for route in (CHAT, "/tokenize", "/train")),
        ("POST", "/train", train_body()),
    ]
    for method, route, body in asked:
        answer = await http.request(method, route, json=body)
        assert answer.headers["cache-control"] == "no-store", route
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy, route
        assert "script-src" not in policy


def _behaviour() -> Any:
    from actors.dream.behaviour import Behaviour

    return Behaviour.model_validate(
        {"name": "brief", "instruction": "Be brief.", "checks": {"max_words": 5}}
    )


async def test_docs_need_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    text = (await http.get("/docs")).text
    paths = (await http.get("/openapi.json")).json()["paths"]
    assert all(path in text for path in paths) and len(paths) > 20
    assert "<script" not in text and not re.search(r"(src|href)=\"(?!/openapi.json)", text)
    assert "//" not in text.replace("<!doctype", "").replace("</", "<")
    for gone in ("/redoc", "/docs/oauth2-redirect"):
        assert (await http.get(gone)).status_code == 404
