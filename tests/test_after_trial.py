"""A commit, and what is to be forgotten, wait for the gate while a dream is on trial."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.errors import OnTrial
from door import base
from tests.open_door import OpenDoor, client, opened

ROUTES = [("/checkpoint", {}), ("/forget", {"item": "a"})]


class Trial:
    """A gate that judges after so many looks."""

    def __init__(self, door: OpenDoor, num_looks: float) -> None:
        self.looks, self._num_looks = 0, num_looks
        for name in ("commit", "forget"):
            setattr(door.journal, name, self._after(getattr(door.journal, name)))

    def _after(self, act: Any) -> Any:
        def once_judged(request: Any) -> Any:
            self.looks += 1
            if self.looks <= self._num_looks:
                raise OnTrial("dream round round-1 is on trial")
            return act(request)

        return once_judged


@pytest.fixture
async def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenDoor]:
    monkeypatch.setattr(base, "TRIAL_INTERVAL_S", 0.01)
    async with opened(tmp_path) as door:
        sample = {"id": "a", "context": "The sky is", "continuation": " green."}
        async with client() as http:
            assert (await http.post("/train", json={"samples": [sample]})).status_code == 202
        yield door


@pytest.mark.parametrize(("route", "body"), ROUTES)
async def test_it_is_done_once_the_dream_is_judged(
    door: OpenDoor, route: str, body: dict[str, Any]
) -> None:
    trial = Trial(door, num_looks=3)
    async with client() as http:
        assert (await http.post(route, json=body)).status_code == 200
    assert trial.looks == 4


@pytest.mark.parametrize(("route", "body"), ROUTES)
@pytest.mark.parametrize("wait_s", [0, 0.05])
async def test_a_trial_that_lasts_longer_is_said_with_a_time_to_try_again(
    door: OpenDoor, route: str, body: dict[str, Any], wait_s: float
) -> None:
    trial = Trial(door, num_looks=float("inf"))
    async with client() as http:
        answer = await http.post(route, json={**body, "wait_s": wait_s})
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert "on trial" in answer.json()["error"]["message"]
    assert trial.looks > 1 if wait_s else trial.looks == 1


async def test_only_so_many_wait_and_the_others_may_chat(door: OpenDoor) -> None:
    Trial(door, num_looks=float("inf"))
    async with client() as http:
        asked = [
            http.post("/checkpoint", json={"wait_s": 0.5}) for _ in range(base.MAX_WAITING + 1)
        ]
        answers = await asyncio.gather(*asked)
    assert sorted(each.status_code for each in answers) == [429] + [503] * base.MAX_WAITING
    assert door._waiting.taken == 0


async def test_the_actor_is_not_asked_while_the_report_says_it_is_of_no_use(door: OpenDoor) -> None:
    trial = Trial(door, num_looks=1)
    report = door._report
    assert report is not None and report.trainer is not None
    door._report = replace(report, trainer=replace(report.trainer, on_trial="round-1"))
    async with client() as http:
        asking = asyncio.create_task(http.post("/checkpoint", json={}))
        await asyncio.sleep(0.2)
        assert trial.looks == 1
        door._report = report
        assert (await asking).status_code == 200 and trial.looks == 2


async def test_a_stop_ends_the_wait(door: OpenDoor) -> None:
    trial, report = Trial(door, num_looks=float("inf")), door._report
    assert report is not None and report.trainer is not None
    door._report = replace(report, trainer=replace(report.trainer, on_trial="round-1"))
    async with client() as http:
        asking = asyncio.create_task(http.post("/checkpoint", json={"wait_s": 600}))
        while not trial.looks:
            await asyncio.sleep(0.01)
        door._report = replace(door._report, state="stopping")
        answer = await asyncio.wait_for(asking, 30)
    assert answer.status_code == 503 and trial.looks == 1


async def test_a_key_that_is_taken_away_meanwhile_commits_nothing(door: OpenDoor) -> None:
    trial = Trial(door, num_looks=float("inf"))
    key, _ = door._keys.add("teach"), door._keys.add("teach")  # Without any, all are let in.
    async with client(key) as http:
        asking = asyncio.create_task(http.post("/checkpoint", json={}))
        while not trial.looks:
            await asyncio.sleep(0.01)
        assert door._keys.remove(door._keys.records()[0]["id"])
        assert (await asking).status_code == 401


@pytest.mark.parametrize("wait_s", [-1, 601, "long", None])
async def test_a_wait_out_of_bounds_is_refused_by_name(door: OpenDoor, wait_s: Any) -> None:
    async with client() as http:
        answer = await http.post("/checkpoint", json={"wait_s": wait_s})
    assert answer.status_code == 422 and "wait_s" in answer.text
