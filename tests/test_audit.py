"""The audit file: a line before and after every act, and no act without its line."""

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from actors.errors import NotFound, Unrecorded
from door import audit
from door.audit import MAX_LISTED, NAME, NO_KEY, Audit
from tests.open_door import OpenDoor, client, opened, train_body

WHO = {"request": "r1", "key": "k1", "route": "POST /train"}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


async def test_an_act_is_noted_before_and_after(tmp_path: Path) -> None:
    async with Audit().act(tmp_path, WHO, "train", samples=2) as made:
        (asked,) = lines(tmp_path)
        made.update(status=202, job_id="j")
    asked_again, done = lines(tmp_path)
    assert asked == asked_again
    del asked["time"], done["time"]
    assert asked == WHO | {"act": "train", "state": "asked", "samples": 2}
    assert done == WHO | {"act": "train", "state": "done", "status": 202, "job_id": "j"}
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("error", "status"),
    [(NotFound("none"), 404), (ZeroDivisionError(), 500), (asyncio.CancelledError(), None)],
)
async def test_what_became_of_it_is_noted(
    tmp_path: Path, error: BaseException, status: int | None
) -> None:
    with pytest.raises(type(error)):
        async with Audit().act(tmp_path, WHO, "train"):
            raise error
    assert lines(tmp_path)[-1]["status"] == status


async def test_an_act_that_cannot_be_noted_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unrecorded, match="make room on the disk"):
        async with Audit().act(tmp_path, WHO, "train"):
            raise AssertionError("it was done")


async def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"time": 1, "requ')
    async with Audit().act(tmp_path, WHO, "train"):
        pass
    torn, *whole = (tmp_path / NAME).read_text().splitlines()
    assert torn == '{"time": 1, "requ' and len([json.loads(line) for line in whole]) == 2


async def test_files_are_put_aside_by_size_and_the_oldest_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MAX_BYTES", 400)
    monkeypatch.setattr(audit, "MAX_FILES", 3)
    (tmp_path / "audit-notes.jsonl").write_text("not one of ours")
    for number in range(30):
        async with Audit().act(tmp_path, WHO, "train", number=number) as made:
            made["status"] = 202
    aside = sorted(path.name for path in tmp_path.glob("audit-0*.jsonl"))
    assert len(aside) == 3 and (tmp_path / "audit-notes.jsonl").exists()
    kept = [json.loads(x) for name in aside for x in (tmp_path / name).read_text().splitlines()]
    numbers = [line["number"] for line in kept if "number" in line]
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), "none is missing between"
    assert all((tmp_path / name).stat().st_size < 800 for name in aside)


async def test_the_file_may_not_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unrecorded):
        async with Audit().act(tmp_path, WHO, "train"):
            raise AssertionError("it was done")
    assert (tmp_path / "elsewhere").read_text() == ""


# Through the door.

BRIEF = {"instruction": "Secret words.", "checks": {"max_words": 5}}
ACTS: list[tuple[str, str, Any, str, int]] = [
    ("POST", "/train", train_body("Secret words.", id="s"), "train", 202),
    ("DELETE", "/train/jobs/none", None, "cancel", 404),
    ("POST", "/forget", {"item": "s"}, "forget", 200),
    ("POST", "/rollback", {"generation": 1}, "rollback", 200),
    ("POST", "/rollback", {"generation": 99}, "rollback", 404),
    ("POST", "/checkpoint", {}, "checkpoint", 200),
    ("PUT", "/behaviours/brief", BRIEF, "put behaviour", 200),
    ("POST", "/dream", {"rounds": 2}, "dream", 202),
    ("DELETE", "/dream", None, "stop dreaming", 200),
    ("DELETE", "/behaviours/brief", None, "delete behaviour", 204),
    ("POST", "/memories", {"memories": [{"text": "Secret words."}]}, "add memories", 201),
    ("DELETE", "/memories/none", None, "delete memory", 404),
    ("POST", "/candidates/none", {"decision": "approve"}, "decide candidate", 404),
    ("DELETE", "/conversations/none", None, "delete conversation", 404),
]


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[OpenDoor]:
    async with opened(tmp_path / "home") as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "state" / "made-up"


async def test_every_teaching_act_has_its_two_lines(door: OpenDoor, folder: Path) -> None:
    key = door._keys.add("teach")
    key_id = door._keys.records()[0]["id"]
    async with client(key) as http:
        for method, route, body, act, status in ACTS:
            answer = await http.request(method, route, json=body, headers={"x-request-id": "r7"})
            assert answer.status_code == status, answer.text
            asked, done = lines(folder)[-2:]
            assert (asked["act"], asked["state"], done["state"]) == (act, "asked", "done")
            assert done["status"] == status and done["key"] == asked["key"] == key_id
            assert asked["request"] == "r7" and asked["route"].startswith(f"{method} /")
    text = (folder / NAME).read_text()
    assert "Secret" not in text and key not in text and len(lines(folder)) == 2 * len(ACTS)


async def test_every_route_that_changes_something_is_an_act_or_known_to_be_none(
    door: OpenDoor,
) -> None:
    import serve_app

    none = {"/v1/chat/completions", "/tokenize", "/detokenize", "/score", "/checkpoints/verify"}
    acts = {
        (method, route.replace("none", "*").replace("brief", "*")) for method, route, *_ in ACTS
    }
    for path, methods in serve_app.app.openapi()["paths"].items():
        for method in methods.keys() - {"get"}:
            named = path.partition("{")[0] + "*" if "{" in path else path
            assert path in none or (method.upper(), named) in acts, f"{method} {path}"


async def test_without_keys_nobody_is_named(door: OpenDoor, folder: Path) -> None:
    async with client() as http:
        await http.post("/checkpoint", json={})
    assert {line["key"] for line in lines(folder)} == {NO_KEY}


async def test_what_is_refused_before_it_is_an_act_writes_nothing(
    door: OpenDoor, folder: Path
) -> None:
    use = door._keys.add("use")
    for key in (None, use):
        async with client(key) as http:
            for method, route, body, *_ in ACTS:
                assert (await http.request(method, route, json=body)).status_code in (401, 403)
    async with client(door._keys.add("teach")) as http:
        assert (await http.post("/train", json={"samples": []})).status_code == 422
    assert not (folder / NAME).exists()


async def test_on_a_full_disk_nothing_is_taught_and_the_remedy_is_said(
    door: OpenDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Audit, "_write", full)
    async with client() as http:
        answer = await http.post("/train", json=train_body())
        assert (await http.get("/train/jobs")).json() == {"data": []}
    assert answer.status_code == 503 and "make room" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "60"


async def test_many_ids_are_listed_in_part_and_counted_whole(door: OpenDoor, folder: Path) -> None:
    one = train_body()["samples"][0]
    body = {"samples": [one | {"id": f"s{number}"} for number in range(MAX_LISTED + 5)]}
    async with client() as http:
        assert (await http.post("/train", json=body)).status_code == 202
    asked, _ = lines(folder)
    assert asked["samples"] == MAX_LISTED + 5 and len(asked["ids"]) == MAX_LISTED
