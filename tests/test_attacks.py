"""Names that are no names: paths out of the house, links, bytes; every one of them is refused."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.open_door import OpenDoor, client, opened

ATTACKS = (
    *("..", "../..", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "....//....//etc/passwd"),
    *("/etc/passwd", "//etc/passwd", "C:\\Windows\\win.ini", "..\\..\\keys.json", "file:///etc"),
    *("keys.json", "../keys.json", ".", "", " ", "%00", "\x00", "a\x00b", "brief\x00.json"),
    *("%2e%2e%2f", "%252e%252e%252f", "\u2025\u2215", "\uff0e\uff0e\uff0f", "\u202e", "\ufeff"),
    *("' OR 1=1 --", '"; DROP TABLE jobs; --', "%", "_", "*", "$(id)", "`id`", "{{7*7}}", "${x}"),
    *(
        "<script>alert(1)</script>",
        "\r\nSet-Cookie: a=b",
        "-1",
        "NaN",
        "9" * 40,
        "\u0663",
        "a" * 900,
    ),
    *("a" * 900, "link", "link/keys.json", "self/environ", "none;type=i", "con", "nul"),
)
NAMED = (
    *(
        ("GET", route)
        for route in ("/behaviours/{}", "/dream/rounds/{}", "/dream/rounds/{}/report")
    ),
    *(("GET", route) for route in ("/candidates/{}", "/conversations/{}", "/train/jobs/{}")),
    *(("GET", route) for route in ("/train/jobs/{}/events", "/checkpoints/{}", "/ui/{}")),
    *(("DELETE", f"/{kind}/{{}}") for kind in ("behaviours", "memories", "conversations")),
    *(("DELETE", "/train/jobs/{}"), ("POST", "/candidates/{}"), ("PUT", "/behaviours/{}")),
    *(("GET", "/v1/{}"), ("POST", "/v1/{}"), ("GET", "/{}")),
)
BODIES = {
    "POST": {"decision": "approve"},
    "PUT": {"instruction": "Be brief.", "checks": {"max_words": 5}},
}


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[OpenDoor]:
    async with opened(tmp_path / "home", request_timeout_s=0.5) as made:
        made._keys.add("teach")
        for folder in (tmp_path, tmp_path / "home", tmp_path / "home" / "state" / "made-up"):
            (folder / "link").symlink_to(tmp_path / "home")
        yield made


@pytest.mark.parametrize(("method", "route"), NAMED)
async def test_a_name_that_is_none_is_refused_and_reaches_no_file(
    door: OpenDoor, method: str, route: str, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*") if path.suffix not in (".jsonl", ".sqlite-shm")}
    secret = (tmp_path / "home" / "keys.json").read_text()[20:60]
    async with client(door._keys.add("teach")) as http:
        for attack in ATTACKS:
            for named in (quote(attack, safe=""), quote(attack, safe="%/.")):
                answer = await http.request(
                    method, route.format(named), json=BODIES.get(method), follow_redirects=False
                )
                if answer.url.path == "/events":
                    continue  # The client itself has gone up, to what it may ask for.
                where = f"{method} {route.format(named)[:80]}: {answer.status_code}"
                assert _is_harmless(answer, route), f"{where} {answer.text[:300]}"
                assert "root:" not in answer.text and secret not in answer.text, where
                assert "set-cookie" not in answer.headers, where
    made = {path for path in tmp_path.rglob("*") if path.suffix not in (".jsonl", ".sqlite-shm")}
    assert made == before, "a file was made"


def _is_harmless(answer: httpx.Response, route: str) -> bool:
    """Refused; or it named another route, as `/behaviours/..` does `/`, or vLLM was asked."""
    if answer.status_code in (307, 308):  # To the same without its last slash, here.
        return answer.headers["location"].startswith("http://127.0.0.1:8000/")
    asked = answer.request.url.raw_path.decode()
    if answer.status_code == 200 and answer.request.method == "PUT":
        return re.fullmatch("[a-z0-9-]+", answer.json()["name"]) is not None  # A good name.
    if answer.status_code == 200:
        is_listing = asked.rstrip("/") != route.format("").rstrip("/") or "//" in asked
        return route.startswith("/v1/") or not is_listing or asked.partition("?")[0] in _LISTS
    return 400 <= answer.status_code < 500


_LISTS = (
    *("/behaviours", "/dream/rounds", "/candidates", "/conversations", "/train/jobs"),
    *("/checkpoints", "/memories", "/docs"),
)


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
async def test_vllm_is_asked_for_nothing_outside_its_own_routes(
    door: OpenDoor, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    forward = door._engine.forward

    async def note(request: Any, *rest: Any) -> Any:
        asked.append(request.url.path)
        return await forward(request, *rest)

    monkeypatch.setattr(door._engine, "forward", note)
    async with client(door._keys.add("use")) as http:
        for named in (quote(attack, safe=""), quote(attack, safe="%/.")):
            await http.post(f"/v1/{named}", json={})
    for path in asked:
        parts = path.split("/")
        assert path.startswith("/v1/") and not {"", ".", ".."} & set(parts[1:]), path
