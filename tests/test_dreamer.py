"""The dream actor without Ray: what it takes on, in which order, and what it refuses."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.dream import actor as actors_dream
from actors.dream.actor import Dreamer
from actors.dream.behaviour import Behaviour
from actors.dream.curriculum import RETEST_S, Progress
from actors.dream.exchange import Exchange
from actors.dream.round import Dream
from actors.dream.signal import Signal
from actors.dream.store import DreamStore
from actors.errors import Conflict, InvalidRequest, NotFound, TooBusy, Unavailable
from actors.messages import CellPaths
from actors.posted import DreamRequest, MemoriesRequest, ScoreRequest
from actors.settings import DreamSettings, Settings
from actors.traffic import Traffic
from actors.versions import VersionCounter
from tests.fake_model import FakeModel

BRIEF = Behaviour.model_validate(
    {"name": "brief", "instruction": "Be brief.", "checks": {"max_words": 3}}
)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A dreamer over a fake model whose rounds are noted and not run."""
    paths = CellPaths(str(tmp_path / "tiny"), str(tmp_path), str(tmp_path / "ledger.sqlite"))
    VersionCounter.create(paths.versions)
    Traffic.create(paths.traffic)
    nobody: Any = None
    settings = Settings(home=tmp_path, dream=DreamSettings(max_rounds_queued=3))
    dreamer: Any = Dreamer(settings, paths, nobody, nobody)
    dreamer._store = DreamStore(paths.dream)
    dreamer._engine = FakeModel(
        holds=lambda messages, text: -0.5 if messages[0]["role"] == "system" else -2.0
    )
    dreamer._signal = Signal(lambda: dreamer._engine, dreamer._store, settings.dream, nobody)
    monkeypatch.setattr(actors_dream, "LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(actors_dream, "RETRY_S", 0.01)
    yield SimpleNamespace(dreamer=dreamer, store=dreamer._store, paths=paths, settings=settings)
    dreamer._store.close()


def run(call: Awaitable[Any]) -> Any:
    async def it() -> Any:
        return await call

    return asyncio.run(it())


def ask(made: Any, **request: Any) -> Any:
    return run(made.dreamer.dream(DreamRequest(**request)))


def configure(made: Any, **dream: Any) -> None:
    changed = made.settings.dream.model_copy(update=dream)
    made.dreamer._settings = made.settings.model_copy(update={"dream": changed})


def test_without_a_behaviour_there_is_nothing_to_dream_of(made: Any) -> None:
    with pytest.raises(Conflict, match="PUT /behaviours"):
        ask(made)
    with pytest.raises(NotFound, match="no behaviour 'brief'"):
        ask(made, behaviour="brief")


def test_rounds_that_are_asked_for_are_queued_up_to_a_bound(made: Any) -> None:
    made.store.put_behaviour(BRIEF)
    assert ask(made, rounds=2).asked == 2
    with pytest.raises(TooBusy, match="2 rounds are queued and 2 more would exceed.* 3"):
        ask(made, rounds=2, behaviour="brief")
    assert ask(made, behaviour="brief").asked == 3
    assert made.store.note("asked") == [None, None, "brief"], "on disk, whatever becomes of us"


def test_a_round_is_begun_of_what_was_asked_for_and_each_only_once(made: Any) -> None:
    made.store.put_behaviour(BRIEF)
    made.store.put_behaviour(BRIEF.model_copy(update={"name": "other"}))
    ask(made, behaviour="other")
    begun = made.dreamer._next_round()
    assert (begun.behaviour, made.store.note("asked")) == ("other", [])
    begun.state = "empty"
    made.store.save_round(begun)
    assert made.dreamer._next_round() is None


def test_a_behaviour_that_was_deleted_meanwhile_is_passed_over(made: Any) -> None:
    made.store.put_behaviour(BRIEF)
    ask(made, behaviour="brief")
    made.store.delete_behaviour("brief")
    assert made.dreamer._next_round() is None and made.store.note("asked") == []


def test_by_itself_it_dreams_only_if_told_to_and_after_a_while_of_silence(made: Any) -> None:
    made.store.put_behaviour(BRIEF)
    assert made.dreamer._next_round() is None
    configure(made, when_idle=True, idle_s=60)
    door = Traffic(made.paths.traffic, is_writable=True)
    door.enter()
    assert made.dreamer._next_round() is None
    door.leave()
    assert made.dreamer._next_round() is None
    configure(made, when_idle=True, idle_s=0)
    assert made.dreamer._next_round().behaviour == "brief"


def stand(made: Any, standing: Any) -> None:
    made.store.set_progress(Progress("brief", 0.9, standing, 0.0, tested_round=1))


def test_what_rests_is_dreamt_of_again_when_asked_for_and_after_a_day_by_itself(made: Any) -> None:
    made.store.put_behaviour(BRIEF)
    configure(made, when_idle=True, idle_s=0)
    first = made.dreamer._next_round()
    first.state, first.ended = "empty", time.time()
    made.store.save_round(first)
    stand(made, "resting")
    assert made.dreamer._next_round() is None
    first.ended -= RETEST_S
    made.store.save_round(first)
    second = made.dreamer._next_round()
    assert second.behaviour == "brief"
    second.state, second.ended = "empty", time.time()
    made.store.save_round(second)
    assert made.dreamer._next_round() is None
    ask(made)
    assert made.dreamer._next_round().behaviour == "brief"


def test_what_the_gate_has_stopped_is_dreamt_of_only_by_its_name(made: Any) -> None:
    made.store.put_behaviour(BRIEF)
    stand(made, "stopped")
    with pytest.raises(Conflict, match="stopped every behaviour; name the one"):
        ask(made)
    ask(made, behaviour="brief")
    assert made.dreamer._next_round().behaviour == "brief"


@pytest.mark.parametrize("budget", ["max_tokens_per_day", "max_steps_per_day"])
def test_a_budget_that_is_used_up_holds_rounds_back_and_is_said(made: Any, budget: str) -> None:
    made.store.put_behaviour(BRIEF)
    configure(made, **{budget: 0})
    assert ask(made).asked == 1
    assert made.dreamer._next_round() is None
    assert f"dream.{budget}=0 is used up" in made.dreamer._describe().paused
    assert made.dreamer._describe().asked == 1, "it is not forgotten"
    configure(made)
    assert made.dreamer._next_round() is not None


def story(made: Any, dream: Callable[[Any], Awaitable[Any]], seconds: float) -> None:
    """Let the loop run for a while with `dream` in the place of a round."""

    async def told() -> None:
        loop = asyncio.create_task(made.dreamer._dream_on())
        await asyncio.sleep(seconds)
        if made.dreamer._running is not None:
            await made.dreamer.stop_dreaming()
            await asyncio.sleep(0.1)
        loop.cancel()

    monkey = pytest.MonkeyPatch()
    monkey.setattr(Dream, "run", lambda self, of: dream(of))
    try:
        asyncio.run(told())
    finally:
        monkey.undo()


def test_stopping_forgets_what_was_asked_and_ends_the_round(made: Any) -> None:
    made.store.put_behaviour(BRIEF)
    ask(made, rounds=3)

    async def never_ends(of: Any) -> None:
        await asyncio.sleep(60)

    story(made, never_ends, 0.3)
    (only,) = made.store.rounds(10)
    assert (only.state, only.reason) == ("failed", "it was stopped on request")
    assert made.store.note("asked") == [] and made.dreamer._reason is None


def test_a_round_that_breaks_off_says_why_and_the_next_one_comes(made: Any) -> None:
    made.store.put_behaviour(BRIEF)
    ask(made, rounds=2)

    async def breaks(of: Any) -> None:
        raise InvalidRequest("vLLM refused it")

    story(made, breaks, 0.5)
    assert [each.reason for each in made.store.rounds(10)] == ["vLLM refused it"] * 2
    assert made.dreamer._reason is None


def score(made: Any, *roles: str, strip: Any = None) -> Any:
    messages = [{"role": role, "content": f"words of {role}"} for role in roles]
    more = {} if strip is None else {"strip": strip}
    return run(made.dreamer.score(ScoreRequest.model_validate({"messages": messages, **more})))


def test_a_score_is_what_the_instruction_adds_per_token(made: Any) -> None:
    found = score(made, "system", "user", "assistant")
    assert found == {"with": -0.5, "without": -2.0, "divergence": 1.5}


@pytest.mark.parametrize(
    ("roles", "strip", "says"),
    [
        (("system", "user"), None, "the last one is the user's"),
        (("user", "assistant"), None, "no message is stripped"),
        (("system", "assistant"), None, "every message is stripped"),
        (("system", "user", "assistant"), ["tool"], "no message is stripped"),
    ],
)
def test_a_score_without_two_sides_is_refused(
    made: Any, roles: tuple[str, ...], strip: Any, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        score(made, *roles, strip=strip)


def test_memories_get_ids_and_come_back_newest_first(made: Any) -> None:
    posted = {"memories": [{"text": "one"}, {"text": "two", "id": "mine", "tags": ["a"]}]}
    kept = run(made.dreamer.add_memories(MemoriesRequest.model_validate(posted)))
    assert kept[0].id.startswith("memory-") and kept[1].id == "mine"
    assert run(made.dreamer.memories(10)) == kept[::-1]
    run(made.dreamer.delete_memory("mine"))
    assert run(made.dreamer.memories(10)) == kept[:1]


def chat(question: str) -> Exchange:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    reply = {"choices": [{"message": {"content": "So."}, "finish_reason": "stop"}]}
    sent = json.dumps({"messages": turns}).encode()
    return Exchange(sent, json.dumps(reply).encode(), False, 0, 0, True, 1.0)


def test_rounds_come_before_what_was_said_and_that_is_looked_at_then(made: Any) -> None:
    made.store.put_behaviour(BRIEF)
    ask(made, rounds=2)
    assert run(made.dreamer.hear((chat("Why?"),))) == 1
    made.dreamer._signal._cell = SimpleNamespace(weights_version=lambda: 3)
    unscored: list[int] = []

    async def ends(of: Any) -> None:
        unscored.append(made.dreamer._describe().unscored)
        of.state = "empty"
        made.store.save_round(of)

    story(made, ends, 0.5)
    assert unscored == [1, 1]
    described = made.dreamer._describe()
    assert (described.unscored, described.proposed, described.reason) == (0, 1, None)


@pytest.mark.parametrize("error", [Unavailable("it restarts"), TooBusy("it is full")])
def test_what_cannot_be_had_just_now_does_not_end_the_loop(made: Any, error: Exception) -> None:
    looks: list[int] = []

    async def looks_in_vain() -> bool:
        looks.append(1)
        raise error

    made.dreamer._signal.look = looks_in_vain
    story(made, lambda of: asyncio.sleep(0), 0.3)
    assert len(looks) > 2 and made.dreamer._reason is None
