"""A paused engine goes on: after every end of a step, and without a word from the trainer."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors.engine import Engine
from actors.messages import CellPaths
from actors.pausing import paused_engine
from actors.settings import Settings


class StillLLM:
    """vLLM's two calls."""

    def __init__(self) -> None:
        self.is_paused = False

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False), "requests in flight go on where they were"
        self.is_paused = True

    async def resume_generation(self) -> None:
        self.is_paused = False


@pytest.fixture
def llm() -> StillLLM:
    return StillLLM()


@pytest.fixture
def engine(llm: StillLLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    made: Any = Engine(Settings(), CellPaths("", "", ""))
    made._llm = llm
    return made


@pytest.mark.parametrize("failure", [None, ArithmeticError("nan"), MemoryError("half a step")])
def test_engine_is_still_during_a_step_and_goes_on_however_it_ends(
    engine: Any, llm: StillLLM, failure: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.new_event_loop()
    remote = SimpleNamespace(
        pause=SimpleNamespace(remote=lambda limit_s: engine.pause(limit_s)),
        resume=SimpleNamespace(remote=lambda: engine.resume()),
    )
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: remote)
    monkeypatch.setattr(ray, "get", lambda call, timeout: loop.run_until_complete(call))
    try:
        with paused_engine(60):
            assert llm.is_paused
            if failure is not None:
                raise failure
    except (ArithmeticError, MemoryError) as raised:
        assert raised is failure
    assert not llm.is_paused
    loop.run_until_complete(asyncio.sleep(0))
    assert not asyncio.all_tasks(loop), "nothing is left that would end a later pause"
    loop.close()


async def test_engine_goes_on_by_itself_when_nobody_resumes_it(engine: Any, llm: StillLLM) -> None:
    await engine.pause(0.01)
    assert llm.is_paused
    await asyncio.wait_for(engine._end_of_pause, 10)
    assert not llm.is_paused
