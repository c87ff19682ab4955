"""What the dream loop remembers: durable, idempotent where it is said twice, bounded."""

import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from actors.dream import store as stores
from actors.dream.behaviour import Behaviour
from actors.dream.curriculum import Progress
from actors.dream.records import Attempt, Item
from actors.dream.store import DreamStore, Memory
from actors.errors import Conflict, NotFound, SettingsError

BRIEF = Behaviour.model_validate(
    {"name": "brief", "instruction": "Be brief.", "checks": {"max_words": 5}, "target": 0.8}
)
ITEM = Item("i1", "round-1", "brief", "new", "Why?", "So.", is_kept=True, memories=("a", "b"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dream.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[DreamStore]:
    made = DreamStore(path)
    yield made
    made.close()


def memory(name: str) -> Memory:
    return Memory(name, f"text of {name}", ("tag",), 1.0)


def test_the_file_is_its_users_alone_and_survives_being_closed(
    path: Path, store: DreamStore
) -> None:
    store.add_memories([memory("a"), memory("b")])
    store.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = DreamStore(path)
    assert again.memories() == [memory("b"), memory("a")]
    again.close()


def test_a_file_of_a_newer_reverie_is_refused(path: Path, store: DreamStore) -> None:
    store._db.execute("PRAGMA user_version = 9")
    store.close()
    with pytest.raises(SettingsError, match="dream format 9, and this Reverie knows 2"):
        DreamStore(path)


def test_memories_are_kept_all_or_none(store: DreamStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add_memories([memory("a")])
    with pytest.raises(Conflict, match="nothing of this request was kept"):
        store.add_memories([memory("b"), replace(memory("a"), text="another")])
    assert store.add_memories([replace(memory("a"), created=2.0)]) == [memory("a")], "it is there"
    monkeypatch.setattr(stores, "MAX_MEMORIES", 2)
    with pytest.raises(Conflict, match="there would be 3 memories and the bound is 2"):
        store.add_memories([memory("b"), memory("c")])
    assert store.memories() == [memory("a")]
    store.delete_memory("a")
    with pytest.raises(NotFound, match="no memory 'a'"):
        store.delete_memory("a")


def test_a_behaviour_comes_back_as_it_was_put(store: DreamStore) -> None:
    store.put_behaviour(BRIEF)
    assert store.behaviour("brief") == (BRIEF, Progress("brief", 0.8))
    with pytest.raises(NotFound, match="no behaviour 'other'"):
        store.behaviour("other")


def test_a_behaviour_that_is_put_again_learns_from_the_start(store: DreamStore) -> None:
    store.put_behaviour(BRIEF)
    store.set_progress(Progress("brief", 0.8, "resting", 0.1, 3))
    store.save_items([replace(ITEM, id="h", kind="held_out", round_id="")])
    assert len(store.held_out("brief")) == 1
    store.put_behaviour(BRIEF)
    assert store.behaviour("brief")[1] == Progress("brief", 0.8)
    assert store.held_out("brief") == [], "they were written for the one before"


def test_progress_does_not_bring_a_deleted_behaviour_back(store: DreamStore) -> None:
    store.put_behaviour(BRIEF)
    store.delete_behaviour("brief")
    store.set_progress(Progress("brief", 0.8))
    assert store.behaviours() == []
    with pytest.raises(NotFound):
        store.delete_behaviour("brief")


def test_rounds_come_back_whole_and_only_one_is_open(store: DreamStore) -> None:
    begun = store.begin_round("brief", 0.7)
    assert (begun.id, store.open_round()) == ("round-1", begun)
    with pytest.raises(AssertionError, match="one round at a time"):
        store.begin_round("brief", 0.7)
    begun.attempts.append(Attempt(1e-5, "job-1", (2.0, 1.0), {"kl": 0.1}, {"brief": 0.5}, ("f",)))
    begun.state, begun.tokens, begun.seconds = "passed", 12, {"imagining": 2.5}
    store.save_round(begun)
    assert store.open_round() is None and store.round("round-1") == begun
    second = store.begin_round("brief", 0.7)
    assert [each.id for each in store.rounds(10)] == [second.id, begun.id]
    used = store.usage(begun.created + 1)
    assert (used.tokens, used.steps, used.seconds) == (12, 2, 2.5)
    assert store.usage(begun.created + 2 * stores.DAY_S) == stores.Usage()
    with pytest.raises(NotFound, match="no round 'round-9'"):
        store.round("round-9")


def test_an_item_that_is_saved_twice_stays_as_it_was_first(store: DreamStore) -> None:
    store.save_items([ITEM])
    store.save_items([replace(ITEM, answer="Other."), replace(ITEM, id="i2")])
    assert store.items("round-1") == [ITEM, replace(ITEM, id="i2")]


def test_only_what_passed_and_was_not_marked_is_rehearsed(store: DreamStore) -> None:
    for state in ("passed", "taken back", "passed"):
        made = store.begin_round("brief", 0.7)
        number = made.number
        store.save_items([replace(ITEM, id=f"kept-{number}", round_id=made.id)])
        store.save_items([replace(ITEM, id=f"dropped-{number}", round_id=made.id, is_kept=False)])
        made.state = state
        store.save_round(made)
    store.mark_items("round-3")
    assert [item.id for item in store.learned(besides="other")] == ["kept-1"]
    assert store.learned(besides="brief") == []


def test_a_note_is_replaced_whole(store: DreamStore) -> None:
    assert store.note("asked") is None
    store.write_note("asked", [None, "brief"])
    store.write_note("asked", ["brief"])
    assert store.note("asked") == ["brief"]
