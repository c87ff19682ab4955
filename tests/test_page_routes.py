"""The page's files and feed without a browser: what is served, how, and to whom."""

import asyncio
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.errors import TooBusy
from door import feed
from door.feed import MAX_LISTENERS, Feed
from door.keys import KeyStore
from door.page_routes import FILES, FOLDER, INDEX, NAMES
from tests.fake_door import FakeCell, served
from tests.test_tidy import MAX_COLUMNS, MAX_LINES

TEACHER = {"may_teach": True, "has_keys": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("page") / "home", FakeCell()) as address:
        yield address


# Files.


def test_every_file_of_the_folder_is_named_and_small_and_plain() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {INDEX, *NAMES}
    for path in FOLDER.iterdir():
        lines = path.read_bytes().decode("ascii").splitlines()
        assert len(lines) <= MAX_LINES and max(map(len, lines)) <= MAX_COLUMNS, path.name


def test_every_module_that_is_imported_is_there_and_all_are_used() -> None:
    used = {"main.js"}
    for name in [name for name in NAMES if name.endswith(".js")]:
        text = (FOLDER / name).read_text()
        imported = re.findall(r'from "\./([\w.]+)"', text)
        assert set(imported) <= set(NAMES), name
        assert text.count(' from "') == len(imported), f"{name} imports something else"
        used |= set(imported)
    assert used == {name for name in NAMES if name.endswith(".js")}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def test_nothing_is_inline_and_nothing_is_elsewhere() -> None:
    tags = Tags()
    tags.feed((FOLDER / INDEX).read_text())
    fetched = {value for _, name, value in tags.attributes if name in ("src", "href")}
    files = {f"ui/{name}" for name in ("page.css", "parts.css", "main.js", "icon.svg")}
    assert fetched == files | {"#question", "docs"}
    assert not [name for _, name, _ in tags.attributes if name == "style" or name[:2] == "on"]
    for name in NAMES:
        text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|url\(|@import|innerHTML|eval\(", text), name


@pytest.mark.parametrize("name", ["", *NAMES])
def test_each_file_has_its_type_its_headers_and_its_tag(base: str, name: str) -> None:
    path = f"{base}/ui/{name}" if name else f"{base}/ui"
    answer = httpx.get(path)
    assert answer.status_code == 200 and answer.content == FILES[name or INDEX].body
    suffix = Path(name or INDEX).suffix
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    assert answer.headers["content-type"].startswith(kinds.get(suffix, "image/svg+xml"))
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in answer.headers
    again = httpx.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert again.headers["content-security-policy"] == "; ".join(policy)
    other = httpx.get(path, headers={"if-none-match": '"0"'})
    assert other.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/ui/index.html",
        "/ui/none.js",
        "/ui/..%2fpage_routes.py",
        "/ui/%2e%2e/keys.py",
        "/ui/....//keys.py",
        "/ui//etc/passwd",
        "/ui/%2fetc%2fpasswd",
        "/ui/main.js%00.css",
        "/ui/MAIN.JS",
    ],
)
def test_nothing_else_is_served(base: str, path: str) -> None:
    # httpx would tidy the path; this is sent as it stands.
    request = httpx.Request("GET", base, extensions={"target": path.encode()})
    with httpx.Client() as client:
        answer = client.send(request)
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["type"] == "not_found_error"


def test_files_need_no_key_and_everything_they_ask_for_does(tmp_path: Path) -> None:
    with served(tmp_path / "home", FakeCell()) as base:
        use = KeyStore(tmp_path / "home").add("use")
        teach = KeyStore(tmp_path / "home").add("teach")
        assert httpx.get(f"{base}/ui").status_code == 200
        assert httpx.get(f"{base}/events").status_code == 401
        assert httpx.get(f"{base}/learned").status_code == 401
        assert get(base, "/learned", use).status_code == 403
        assert get(base, "/learned", teach).json()["since"] == 36
        assert first_events(base, use)["you"] == {"may_teach": False, "has_keys": True}
        told = first_events(base, teach)
        assert told["you"] == {"may_teach": True, "has_keys": True}
        assert told["status"] == get(base, "/status", use).json()


def get(base: str, path: str, key: str) -> httpx.Response:
    return httpx.get(base + path, headers={"authorization": f"Bearer {key}"})


def first_events(base: str, key: str) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"}
    found, name = {}, ""
    with httpx.stream("GET", f"{base}/events", headers=headers) as answer:
        assert answer.headers["cache-control"] == "no-store"
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                found[name] = json.loads(line[6:])
            if name == "status" and not line:
                break
    return found


# The feed.


def snapshot(steps: int, state: str = "ready") -> dict[str, Any]:
    loss = None if not steps else 1 / steps
    trainer = {"job_id": "job-1", "steps": steps, "weights_version": 10 + steps}
    return {"state": state, "trainer": trainer | {"last_loss": loss, "last_changed": 0.5}}


class Listener:
    """Reads a feed as the page does."""

    def __init__(self, of: Feed, limit_s: float = 60) -> None:
        self.may_go_on = True
        self.events = of.listen(TEACHER, lambda: self.may_go_on, limit_s)

    async def next(self) -> tuple[str, Any]:
        async with asyncio.timeout(5):
            text = await anext(self.events)
        if text.startswith(":"):
            return "comment", text
        name, data, *_ = text.splitlines()
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_all_listeners_are_told_what_changed_and_nothing_twice() -> None:
    told = Feed()
    told.tell(snapshot(1))
    listeners = [Listener(told), Listener(told)]
    step = {"version": 11, "loss": 1.0, "changed": 0.5}
    for each in listeners:
        assert await each.next() == ("you", TEACHER)
        assert await each.next() == ("steps", [step])
        assert await each.next() == ("status", snapshot(1))
    waiting = [asyncio.ensure_future(each.next()) for each in listeners]
    told.tell(snapshot(1))
    await asyncio.sleep(0.05)
    assert not any(each.done() for each in waiting), "nothing had changed"
    told.tell(snapshot(2))
    assert await asyncio.gather(*waiting) == [("status", snapshot(2))] * 2
    told.tell(snapshot(3))
    told.tell(snapshot(4))
    assert await listeners[0].next() == ("status", snapshot(4)), "only the newest counts"


async def test_a_step_is_remembered_once_for_those_who_come_later() -> None:
    told = Feed()
    for steps in (0, 1, 1, 2):
        told.tell(snapshot(steps) | {"ingress": object()})
    late = Listener(told)
    await late.next()
    assert [each["version"] for each in (await late.next())[1]] == [11, 12]


async def test_silence_is_broken_by_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "HEARTBEAT_S", 0.01)
    told = Feed()
    listener = Listener(told)
    names = [(await listener.next())[0] for _ in range(5)]
    assert names == ["you", "steps", "status", "comment", "comment"]


@pytest.mark.parametrize("why", ["time", "key", "stop"])
async def test_a_listener_is_sent_away(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "HEARTBEAT_S", 0.01)
    told = Feed()
    listener = Listener(told, limit_s=0.05 if why == "time" else 60)
    for _ in range(3):
        await listener.next()
    listener.may_go_on = why != "key"
    if why == "stop":
        told.tell(snapshot(1, "stopping"))
    with pytest.raises(StopAsyncIteration):
        for _ in range(100):
            await listener.next()


def test_listeners_are_bounded() -> None:
    told = Feed()
    for _ in range(MAX_LISTENERS):
        told.listeners.take()
    with pytest.raises(TooBusy):
        told.listeners.take()
