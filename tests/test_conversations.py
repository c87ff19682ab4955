"""What was said, on disk: what is one conversation, bounds, and that what is deleted is gone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.dream import conversations
from actors.dream.exchange import Exchange, Said
from actors.dream.store import _SCHEMA, DreamStore
from actors.errors import Conflict, NotFound


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DreamStore]:
    made = DreamStore(tmp_path / "dream.sqlite")
    yield made
    made.close()


def log(store: DreamStore, *said: str, system: str = "Be brief.", created: float = 1.0) -> int:
    """One exchange: turns of user and assistant in alternation, the last one the answer."""
    *before, answer = said
    turns = [{"role": "system", "content": system, "strip": True}]
    for at, text in enumerate(before):
        role = "assistant" if at % 2 else "user"
        turns.append({"role": role, "content": text, "strip": False})
    heard = Exchange(b"", b"", False, 3, 4, True, created)
    return store.log([(heard, Said(tuple(turns), answer))])


def propose(store: DreamStore, **changes: Any) -> Any:
    logged = store.next_unscored()
    assert logged is not None
    return store.propose(logged.number, "A long answer.", (-0.5, -2.0), 7)


def ids(store: DreamStore) -> list[str]:
    return [each.id for each in store.conversations(10)]


def test_an_exchange_comes_back_as_it_was_said_the_newest_first(store: DreamStore) -> None:
    assert log(store, "Why?", "So.") == log(store, "Who?", "I.") == 1
    logged = store.next_unscored()
    assert logged is not None and logged.state == "new" and logged.may_teach
    assert [turn["content"] for turn in logged.turns] == ["Be brief.", "Who?"]
    assert (logged.answer, logged.first_version, logged.last_version) == ("I.", 3, 4)
    assert store.counts() == (2, 0)


def test_exchanges_that_go_on_from_each_other_are_one_conversation(store: DreamStore) -> None:
    log(store, "Why?", "So.", system="It is noon.", created=1)
    log(store, "Why?", "So.", "Really?", "Yes.", system="It is one o'clock.", created=2)
    log(store, "Who?", "I.", created=3)
    log(store, "Why?", "So. ", "Really?", "Yes.", "Sure?", "Quite.", created=4)
    first, other = store.conversations(10)
    assert (first.num_exchanges, first.created, first.changed) == (3, 1, 4)
    assert other.num_exchanges == 1
    assert [each.answer for each in store.conversation(first.id)] == ["So.", "Yes.", "Quite."]


def test_a_candidate_has_both_answers_and_its_conversation(store: DreamStore) -> None:
    log(store, "Why?", "So.")
    made = propose(store)
    assert store.candidate(made.id) == made
    assert (made.answer, made.plain, made.divergence) == ("So.", "A long answer.", 1.5)
    assert (made.state, made.weights_version) == ("proposed", 7)
    (conversation,) = store.conversations(10)
    assert conversation.candidates == (made.id,) and made.conversation == conversation.id
    assert store.next_unscored() is None and store.counts() == (0, 1)
    assert store.conversation(conversation.id)[0].state == "scored"


def test_candidates_are_listed_by_their_state(store: DreamStore) -> None:
    for at in range(3):
        log(store, f"Why {at}?", "So.")
    made = [propose(store) for _ in range(3)]
    store.decide(made[0].id, "approved")
    store.decide(made[1].id, "rejected")
    assert [each.id for each in store.candidates(10)] == [each.id for each in reversed(made)]
    assert [each.id for each in store.candidates(10, "approved")] == [made[0].id]
    assert [each.id for each in store.candidates(1, "proposed")] == [made[2].id]


def test_a_decision_stands_and_may_be_said_again(store: DreamStore) -> None:
    log(store, "Why?", "So.")
    made = propose(store)
    store.set_job(made.id, "job-0")
    assert store.candidate(made.id).job_id is None, "it is not approved"
    approved = store.decide(made.id, "approved")
    assert approved.state == "approved" and approved.decided is not None
    assert store.decide(made.id, "approved") == approved
    with pytest.raises(Conflict, match="is approved already and stays so"):
        store.decide(made.id, "rejected")
    store.set_job(made.id, "job-1")
    store.conclude(made.id, None, (7, 9))
    store.conclude(made.id, "too late")
    trained = store.candidate(made.id)
    assert (trained.state, trained.job_id, trained.span) == ("trained", "job-1", (7, 9))
    with pytest.raises(Conflict, match="is trained already"):
        store.decide(made.id, "approved")
    with pytest.raises(NotFound, match="no candidate 'candidate-0'"):
        store.decide("candidate-0", "approved")


def test_only_what_was_approved_without_a_person_counts_for_the_budget(store: DreamStore) -> None:
    for at in range(2):
        log(store, f"Why {at}?", "So.")
        store.decide(propose(store).id, "approved", is_automatic=bool(at))
    assert store.num_automatic(0.0) == 1
    assert store.num_automatic(1e12) == 0


def test_the_oldest_exchanges_go_and_candidates_stay(
    store: DreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "MAX_EXCHANGES", 3)
    log(store, "Why 0?", "So.")
    kept = propose(store)
    log(store, "Why 1?", "So.")
    rejected = propose(store)
    store.decide(rejected.id, "rejected")
    assert [log(store, f"Why {at}?", "So.") for at in (2, 3, 4)] == [1, 1, 1]
    left = [store.conversation(each)[0].turns[-1]["content"] for each in ids(store)]
    assert left == ["Why 4?", "Why 3?", "Why 0?"]
    assert [each.id for each in store.candidates(10)] == [kept.id]


def test_while_all_are_candidates_nothing_more_is_kept(
    store: DreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "MAX_EXCHANGES", 1)
    log(store, "Why?", "So.")
    propose(store)
    assert log(store, "Who?", "I.") == 0
    assert len(ids(store)) == 1 and store.next_unscored() is None


def test_a_deleted_conversation_leaves_nothing_in_any_file(
    store: DreamStore, tmp_path: Path
) -> None:
    log(store, "Where is the XYZZY-QUESTION?", "In the XYZZY-ANSWER.", system="XYZZY-PROMPT")
    made = propose(store)
    store.pass_over(99, "no such exchange")
    log(store, "Who?", "I.", system="PLUGH")
    deleted, other = made.conversation, ids(store)[0]

    def text() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))

    assert b"XYZZY" in text() and b"PLUGH" in text(), "else this would prove nothing"
    store.delete_conversation(deleted)
    assert b"XYZZY" not in text() and b"PLUGH" in text()
    assert ids(store) == [other] and store.candidates(10) == []
    with pytest.raises(NotFound, match="no conversation"):
        store.conversation(deleted)


def test_a_file_from_before_there_were_conversations_gets_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DreamStore, "SCHEMA", _SCHEMA)
    monkeypatch.setattr(DreamStore, "MIGRATIONS", {})
    older = DreamStore(tmp_path / "dream.sqlite")
    older.write_note("asked", ["brief"])
    older.close()
    monkeypatch.undo()
    store = DreamStore(tmp_path / "dream.sqlite")
    assert store.note("asked") == ["brief"]
    assert log(store, "Why?", "So.") == 1
    (columns,) = store._db.execute(
        "SELECT json_group_array(name) FROM pragma_table_info('candidates')"
    )
    assert "learned_until" in json.loads(columns[0])
    store.close()


def test_what_was_deleted_meanwhile_is_not_proposed(store: DreamStore) -> None:
    log(store, "Why?", "So.")
    logged = store.next_unscored()
    assert logged is not None
    store.delete_conversation(logged.conversation)
    assert store.propose(logged.number, "A long answer.", (-0.5, -2.0), 7) is None
    assert store.counts() == (0, 0)
