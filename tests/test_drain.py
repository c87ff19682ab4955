"""A stop lets answers that have begun go on, for a while, and lets nobody in any more."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import draining
from actors.cell import Cell
from actors.messages import CellPaths
from actors.settings import CellSettings, Settings
from actors.traffic import Traffic
from door.feed import MAX_LISTENERS
from tests import open_door
from tests.open_door import client, opened

LIMIT_S = 60


class Stopping:
    """A cell that is ready, of which only the order of its end is real."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, drain_timeout_s: float) -> None:
        monkeypatch.setattr(draining, "DRAINED_S", 0.02)
        monkeypatch.setattr(draining, "INTERVAL_S", 0.005)
        self.ended: list[str] = []
        paths = CellPaths(str(home), str(home), str(home / "ledger.sqlite"))
        self.traffic = Traffic.create(paths.traffic)
        self.cell: Any = Cell(
            Settings(home=home, cell=CellSettings(drain_timeout_s=drain_timeout_s))
        )
        self.cell._state, self.cell._paths = "ready", paths
        engine = SimpleNamespace(stop=SimpleNamespace(remote=lambda: self.ended.append("engine")))
        self.cell._actors = {"engine": engine}

        async def save() -> str:
            self.ended.append("saved")
            return "generation 1"

        async def nothing(*_: Any) -> None:
            pass

        for name, instead in (("_save", save), ("_ended", nothing), ("_tear_down", nothing)):
            monkeypatch.setattr(self.cell, name, instead)


async def test_the_engine_ends_when_the_last_answer_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Stopping(tmp_path, monkeypatch, drain_timeout_s=LIMIT_S)
    one.traffic.enter()
    one.traffic.enter()
    stopping = asyncio.create_task(one.cell.stop())
    for _ in range(2):
        await asyncio.sleep(0.1)
        assert one.ended == ["saved"], "what was learned is kept meanwhile"
        assert one.cell._state == "stopping"
        one.traffic.leave()
    assert await asyncio.wait_for(stopping, LIMIT_S) == "generation 1"
    assert one.ended == ["saved", "engine"]


async def test_an_answer_that_goes_on_is_cut_off_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Stopping(tmp_path, monkeypatch, drain_timeout_s=0.2)
    one.traffic.enter()
    begun = time.monotonic()
    await asyncio.wait_for(one.cell.stop(), LIMIT_S)
    assert one.ended == ["saved", "engine"] and time.monotonic() - begun >= 0.2


async def test_a_request_that_came_before_the_door_knew_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Stopping(tmp_path, monkeypatch, drain_timeout_s=LIMIT_S)
    monkeypatch.setattr(draining, "DRAINED_S", 3.0)
    stopping = asyncio.create_task(one.cell.stop())
    await asyncio.sleep(0.05)
    one.traffic.enter()
    await asyncio.sleep(3.5)
    assert one.ended == ["saved"]
    one.traffic.leave()
    await asyncio.wait_for(stopping, LIMIT_S)


async def test_who_asks_for_a_stop_that_goes_on_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Stopping(tmp_path, monkeypatch, drain_timeout_s=LIMIT_S)
    one.traffic.enter()
    first = asyncio.create_task(one.cell.stop())
    await asyncio.sleep(0.05)
    second = asyncio.create_task(one.cell.stop())
    await asyncio.sleep(0.05)
    assert not second.done() and one.ended == ["saved"]
    one.traffic.leave()
    assert await first == await second == "generation 1"
    assert one.ended == ["saved", "engine"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/train", "/checkpoint", "/score"])
async def test_a_door_of_a_cell_that_stops_lets_nobody_in_and_says_when_to_come_back(
    tmp_path: Path, path: str
) -> None:
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    body = {"/train": open_door.train_body(), "/checkpoint": {}}.get(path, body)
    if path == "/score":
        told = {"role": "system", "content": "Be brief."}
        body = {"messages": [told, *open_door.train_body()["samples"][0]["messages"]]}
    async with opened(tmp_path) as door, client() as http:
        assert (await http.post(path, json=body)).status_code < 300
        door._report = replace(door._report, state="stopping", reason="it was asked to stop")
        refused = await http.post(path, json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
        assert refused.json()["error"]["type"] == "service_unavailable_error"
        assert "stopping" in refused.json()["error"]["message"]
        assert door._slots.taken == 0 and door._traffic.idle_s() > 0


async def test_listeners_of_jobs_are_bounded_with_those_of_the_page(tmp_path: Path) -> None:
    async with opened(tmp_path) as door, client() as http:
        job_id = (await http.post("/train", json=open_door.train_body())).json()["job_id"]
        for _ in range(MAX_LISTENERS):
            door._feed.listeners.take()
        refused = await http.get(f"/train/jobs/{job_id}/events")
        assert refused.status_code == 429 and refused.headers["retry-after"] == "5"
        door._feed.listeners.give()
        assert (await http.delete(f"/train/jobs/{job_id}")).status_code == 200
        shown = await http.get(f"/train/jobs/{job_id}/events")
        assert shown.status_code == 200 and '"cancelled"' in shown.text
        assert door._feed.listeners.taken == MAX_LISTENERS - 1, "the place was given back"
