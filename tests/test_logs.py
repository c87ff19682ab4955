"""Lines of the log: plain or JSON, with the ids of what they are about, from request to step."""

import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors import logs
from actors.events import NAME
from actors.logs import bound, configure, trace_of
from actors.settings import LogSettings
from tests.open_door import OpenDoor, client, opened, train_body

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged from here on, once it is configured."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.__stderr__", stream)
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("", *logs.OURS)}
    yield stream
    root.handlers = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_json_lines_have_ids_facts_and_the_version(written: io.StringIO) -> None:
    configure(LogSettings(format="json"), "trainer", lambda: 7)
    configure(LogSettings(format="json"), "trainer", lambda: 7)
    with bound(job="job-1", trace=TRACE, request=None):
        logging.getLogger("actors.events").info("steps", extra={"last_step": 3})
    logging.getLogger("actors.events").info("boot \u00e4\n", extra={"version": 9})
    logging.getLogger("somebody.else").info("not ours")
    first, second = (json.loads(line) for line in written.getvalue().splitlines())
    assert first.pop("time") and first == {
        "level": "INFO", "logger": "actors.events", "message": "steps", "role": "trainer",
        "version": 7, "job": "job-1", "trace": TRACE, "last_step": 3,
    }  # fmt: skip
    assert (second["version"], second["message"]) == (9, "boot \u00e4\n") and "job" not in second


def test_a_plain_line_stays_one_line_whatever_an_id_holds(written: io.StringIO) -> None:
    configure(LogSettings(), "ingress", lambda: None)
    with bound(request="x\n2026 ERROR forged", trace="t"):
        logging.getLogger("door.access").warning("slow", extra={"seconds": 0.5})
    (line,) = written.getvalue().splitlines()
    assert line.endswith(
        ' WARNING ingress: slow (seconds=0.5 request="x\\n2026 ERROR forged" trace=t)'
    )


def test_an_error_is_told_with_where_it_was_raised(written: io.StringIO) -> None:
    configure(LogSettings(format="json"), "dream", lambda: 1)
    try:
        raise ZeroDivisionError("nothing to divide by")
    except ZeroDivisionError:
        logging.getLogger("actors.dream.actor").exception("the loop ended")
    (line,) = written.getvalue().splitlines()
    assert "ZeroDivisionError" in json.loads(line)["exc_info"]


@pytest.mark.parametrize(
    ("traceparent", "trace"),
    [
        (PARENT, TRACE),
        (f"{PARENT}-what-later-versions-add", TRACE),
        (None, "r1"),
        ("", "r1"),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", "r1"),
        (f"ff-{TRACE}-b7ad6b7169203331-01", "r1"),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", "r1"),
        (f"00-{TRACE}-b7ad-01", "r1"),
    ],
)
def test_trace_is_that_of_a_valid_traceparent_or_the_request(
    traceparent: str | None, trace: str
) -> None:
    assert trace_of(traceparent, "r1") == trace


# Through the door.


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[OpenDoor]:
    async with opened(tmp_path / "home") as made:
        yield made


@pytest.mark.parametrize(("header", "trace"), [({}, "r9"), ({"traceparent": PARENT}, TRACE)])
async def test_a_trace_leads_from_the_request_to_its_job(
    door: OpenDoor, written: io.StringIO, tmp_path: Path, header: dict[str, str], trace: str
) -> None:
    configure(LogSettings(format="json"), "ingress", lambda: 0)
    async with client() as http:
        http.headers.update({"x-request-id": "r9", **header})
        job_id = (await http.post("/train", json=train_body())).json()["job_id"]
        job = (await http.get(f"/train/jobs/{job_id}")).json()
    assert job["trace"] == trace
    queued = door.ledger.next_job()
    assert queued is not None and queued.trace == trace
    events = (tmp_path / "home" / "state" / "made-up" / f"{NAME}.jsonl").read_text().splitlines()
    accepted = json.loads(events[0])
    assert (accepted["event"], accepted["job"], accepted["trace"]) == ("accepted", job_id, trace)
    asked = [json.loads(line) for line in written.getvalue().splitlines()]
    (line,) = [each for each in asked if each["logger"] == "door.access"]
    assert (line["request"], line["trace"], line["route"]) == ("r9", trace, "/train")
    assert (line["status"], line["method"]) == (202, "POST")


async def test_what_was_refused_or_only_looked_at_is_no_line_of_info(
    door: OpenDoor, written: io.StringIO
) -> None:
    configure(LogSettings(), "ingress", lambda: 0)
    key = door._keys.add("use")
    async with client() as http:
        assert (await http.post("/train", json=train_body())).status_code == 401
        assert (await http.get("/nowhere")).status_code == 404
        assert (await http.head("/openapi.json")).status_code == 200
    async with client(key) as http:
        assert (await http.get("/status")).status_code == 200
    assert written.getvalue() == ""


async def test_a_request_that_broke_is_a_warning(
    door: OpenDoor, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a fault")

    configure(LogSettings(), "ingress", lambda: 0)
    monkeypatch.setattr(door, "_ask", broken)
    async with client() as http:
        assert (await http.get("/checkpoints")).status_code == 500
    assert "WARNING ingress: request" in written.getvalue() and "status=500" in written.getvalue()
