"""Requests from the OpenAPI document: no 5xx but 503, no hang, no trace, whatever was generated."""

from pathlib import Path

import httpx
import pytest

import serve_app
from tests import fuzz

NUM_CASES = 300


@pytest.mark.timeout(600)
def test_no_generated_request_breaks_the_door(tmp_path: Path) -> None:
    with fuzz.in_process(tmp_path / "home") as (door, send):
        known = fuzz.furnish(door, send)
        keys = [*[door._keys.add("teach")] * 6, door._keys.add("use"), None, "wrong"]
        document = serve_app.app.openapi()
        made = fuzz.run(
            document, send, NUM_CASES, keys=keys, known=known, secrets=[str(tmp_path)], start=1
        )
    assert made.faults == []
    assert made.sent >= NUM_CASES * 0.8 and {200, 401, 403, 404, 422} <= set(made.statuses)


def test_what_is_looked_for_is_found() -> None:
    asked = httpx.Request("GET", "http://127.0.0.1/status")
    body = {"error": {"message": 'Traceback (most recent call last): File "a.py"'}}
    bad = httpx.Response(
        500, json=body, headers={"access-control-allow-origin": "*"}, request=asked
    )
    found = " ".join(fuzz.faults_of(bad, ["most recent"]))
    for what in ("status 500", "Access-Control", "no-store", "four parts", "Traceback", "recent"):
        assert what in found
    good = httpx.Response(200, json={}, headers={"cache-control": "no-store"}, request=asked)
    assert fuzz.faults_of(good, []) == []
