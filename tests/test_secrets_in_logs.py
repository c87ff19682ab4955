"""Nothing that was said, and no key, is in any log, whatever level it has and whoever writes it."""

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.open_door import OpenDoor, client, opened

MARK = "zanzibar-marmalade"
CHAT = "/v1/chat/completions"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[OpenDoor]:
    async with opened(tmp_path / "home") as made:
        yield made


def _turns(text: str = MARK) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
    ]


def _asked() -> list[tuple[str, str, Any]]:
    """Right ones and wrong ones: it is in errors that values like to be shown."""
    sample = {"messages": _turns()}
    wrong: list[Any] = [
        {"samples": [sample | {"weight": MARK}]},
        {"samples": [{"messages": [{"role": MARK, "content": MARK}]}]},
        {"samples": [sample], MARK: 1},
        {"samples": [{"context": MARK, "continuation": MARK + "\ud800"}]},
        {"samples": MARK},
    ]
    return [
        ("POST", CHAT, {"messages": _turns()}),
        ("POST", CHAT, {"messages": _turns(), "stream": True}),
        ("POST", "/v1/completions", {"prompt": MARK}),
        ("POST", "/tokenize", {"prompt": MARK}),
        ("POST", "/train", {"samples": [sample]}),
        *(("POST", "/train", body) for body in wrong),
        ("POST", "/memories", {"memories": [{"text": MARK}]}),
        ("POST", "/memories", {"memories": [{"text": MARK * 300}]}),
        ("PUT", "/behaviours/brief", {"instruction": MARK, "checks": {"max_words": 5}}),
        ("PUT", "/behaviours/brief", {"instruction": MARK, "checks": {"must_match": ["(" + MARK]}}),
        ("POST", "/score", {"messages": _turns()}),
        ("POST", "/forget", {"item": 3}),
    ]


async def test_prompts_and_keys_are_in_no_log(
    door: OpenDoor,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    keys = [door._keys.add("teach"), door._keys.add("use"), "rv-" + MARK]
    new = door._keys.rotate(door._keys.records()[0]["id"])
    caplog.set_level(logging.DEBUG)
    statuses = set()
    for key in (*keys, str(new)):
        headers = {"x-reverie-log": "on", "x-odd": MARK}
        async with client(key) as http:
            http.headers.update(headers)
            for method, route, body in _asked():
                content = json.dumps(body).encode()
                answer = await http.request(
                    method, route, content=content, headers={"content-type": "application/json"}
                )
                statuses.add(answer.status_code)
            for raw in (b"{" + MARK.encode(), b"\xff" + MARK.encode(), b'{"a": NaN, "b": ' * 9):
                headers = {"content-type": "application/json"}
                statuses.add((await http.post("/train", content=raw, headers=headers)).status_code)
    assert {200, 201, 202, 400, 401, 403, 422} <= statuses and not statuses & {500}
    printed = capfd.readouterr()
    # All of a record: what is logged as JSON has more than the message.
    logged = "\n".join(f"{each.getMessage()} {vars(each)}" for each in caplog.records)
    events = (tmp_path / "home" / "state" / "made-up" / "events.jsonl").read_text()
    for text in (logged, events, printed.out, printed.err):
        for secret in (MARK, *keys, str(new)):
            assert secret not in text and secret.removeprefix("rv-") not in text
    assert logged and "accepted" in events, "nothing was told: the test would prove nothing"


async def test_an_error_inside_does_not_tell_what_was_said(
    door: OpenDoor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"a fault with {MARK} in it")

    monkeypatch.setattr(door, "_ask", broken)
    async with client() as http:
        answer = await http.post("/train", json={"samples": [{"messages": _turns()[1:]}]})
    assert answer.status_code == 500 and MARK not in answer.text
    assert answer.json()["error"]["message"] == "something went wrong inside; the log has it"
