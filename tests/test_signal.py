"""The training signal: what becomes a candidate, is learned once, and is gone once deleted."""

import asyncio
import json
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actors.dream import conversations
from actors.dream import signal as signals
from actors.dream.exchange import Exchange
from actors.dream.signal import Cell, Signal
from actors.dream.store import DreamStore, Memory
from actors.errors import Conflict, InvalidRequest, NotFound, TooBusy, Unavailable
from actors.messages import GenerationView, JobView
from actors.posted import ChatSample, TrainConfig
from actors.settings import DreamSettings, LimitSettings
from tests.fake_model import FakeModel

SYSTEM = {"role": "system", "content": "Always answer like a pirate would."}
LIKELY, UNLIKELY = -0.5, -2.0


@dataclass
class FakeCell:
    """Takes each sample once, as the ledger does; jobs end when they are told to."""

    jobs: dict[str, JobView] = field(default_factory=dict)
    trained: list[ChatSample] = field(default_factory=list)
    configs: list[TrainConfig] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    error: Exception | None = None
    kept: list[GenerationView] = field(default_factory=list)

    def weights_version(self) -> int:
        return 7

    async def train(
        self, round_id: None, samples: Sequence[ChatSample], config: TrainConfig
    ) -> str:
        if self.error is not None:
            raise self.error
        (sample,) = samples
        job_id = f"job-{sample.id}"
        if sample not in self.trained:
            assert all(sample.id != each.id for each in self.trained), "another content"
            self.trained.append(sample)
            self.configs.append(config)
            self.jobs[job_id] = job(job_id, "queued")
        return job_id

    async def job(self, job_id: str) -> JobView:
        self.asked.append(f"job {job_id}")
        if job_id not in self.jobs:
            raise NotFound(f"there is no job {job_id!r}")
        return self.jobs[job_id]

    async def cancel(self, job_id: str) -> None:
        self.asked.append(f"cancel {job_id}")
        if self.error is None:
            self.jobs[job_id] = job(job_id, "cancelled", steps=1, before=9, after=10)

    async def generations(self) -> list[GenerationView]:
        return self.kept


def job(
    job_id: str, status: Any, steps: int = 0, before: int | None = None, after: int | None = None
) -> JobView:
    return JobView(job_id, status, 0.0, 1, steps, 2, (), before, after, None)


def check_protocol(cell: FakeCell) -> Cell:
    """Mypy holds the fake to the protocol of the real one here."""
    return cell


@dataclass
class Made:
    signal: Signal
    store: DreamStore
    cell: FakeCell
    model: FakeModel

    def hear(self, question: str = "Why?", answer: str = "Arr, so.", **changes: Any) -> int:
        request = {"messages": [SYSTEM, {"role": "user", "content": question}]}
        reply = {"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
        body, bytes_ = json.dumps(request).encode(), json.dumps(reply).encode()
        heard = Exchange(body, bytes_, False, 1, 1, changes.pop("may_teach", True), 1.0)
        return self.signal.hear([heard])

    def look(self, times: int = 1) -> bool:
        for _ in range(times - 1):
            run(self.signal.look())
        return bool(run(self.signal.look()))

    def candidate(self) -> Any:
        """A proposed one."""
        self.hear(f"Why {len(self.store.candidates(100))}?", f"Arr, {len(self.cell.trained)}.")
        self.look()
        return self.store.candidates(1)[0]

    def reasons(self) -> list[str | None]:
        found = self.store.conversations(100)
        return [each.reason for of in found for each in self.store.conversation(of.id)]


def run(call: Awaitable[Any]) -> Any:
    async def it() -> Any:
        return await call

    return asyncio.run(it())


def holds(messages: Sequence[Any], text: str) -> float:
    return LIKELY if any("pirate" in each["content"] for each in messages) else UNLIKELY


def made_with(tmp_path: Path, **settings: Any) -> Iterator[Made]:
    store, cell = DreamStore(tmp_path / "dream.sqlite"), FakeCell()
    model = FakeModel(holds=holds, says=lambda messages, at: "It is so.")
    dream = DreamSettings(**settings)
    yield Made(Signal(lambda: model, store, dream, cell), store, cell, model)
    store.close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    yield from made_with(tmp_path)


@pytest.fixture
def automatic(tmp_path: Path) -> Iterator[Made]:
    yield from made_with(tmp_path, approved_per_day=1, objective="distill", epochs=3)


# Scoring.


def test_an_answer_that_the_instructions_made_is_a_candidate_beside_the_plain_one(
    made: Made,
) -> None:
    assert made.hear() == 1
    assert made.look() is True
    (candidate,) = made.store.candidates(10)
    assert (candidate.answer, candidate.plain) == ("Arr, so.", "It is so.")
    assert (candidate.shown, candidate.hidden, candidate.divergence) == (-0.5, -2.0, 1.5)
    assert (candidate.state, candidate.weights_version) == ("proposed", 7)
    assert made.look() is False and made.cell.trained == [], "nobody has approved it"


def test_memories_are_stripped_with_the_system_prompt(made: Made) -> None:
    made.store.add_memories([Memory("m", "My ship is called Gertrude.", (), 1.0)])
    made.hear("My ship is called Gertrude.\nWhat shall I paint on it?", "Arr: Gertrude.")
    seen: list[Any] = []

    def listens(messages: Sequence[Any], text: str) -> float:
        seen.append(messages)
        return holds(messages, text)

    made.model.holds = listens
    made.look()
    shown, hidden = seen
    assert shown[0] == SYSTEM
    assert hidden == [{"role": "user", "content": "What shall I paint on it?"}]
    run(made.signal.decide(made.store.candidates(1)[0].id, "approve"))
    assert made.cell.trained[0].messages[1].strip == [[0, 28]]


def test_an_answer_that_needs_no_instructions_is_passed_over(made: Made) -> None:
    made.model.holds = lambda messages, text: LIKELY
    made.hear()
    assert made.look() is True and made.store.candidates(10) == []
    assert made.reasons() == ["divergence 0.00 nats per token, at least 0.3"]
    (logged,) = made.store.conversation(made.store.conversations(1)[0].id)
    assert (logged.state, logged.shown, logged.hidden) == ("passed over", -0.5, -0.5)


@pytest.mark.parametrize(
    ("question", "answer", "says"),
    [
        ("Why?", "I always answer like a pirate would.", "repeats the instruction"),
        ("Why?", "arr arr arr arr " * 6, "comes twice"),
        ("Why?", "It is so.", "says it without instructions, too"),
    ],
)
def test_what_is_not_worth_learning_is_passed_over_with_its_reason(
    made: Made, question: str, answer: str, says: str
) -> None:
    made.hear(question, answer)
    made.look()
    assert made.store.candidates(10) == [] and says in str(made.reasons()[0])


def test_what_is_nearly_a_candidate_that_was_there_is_not_proposed_again(made: Made) -> None:
    made.hear("What is the name of your ship?", "Arr, she is Gertrude, the terror of the seas.")
    made.look()
    made.store.decide(made.store.candidates(1)[0].id, "rejected")
    made.hear("What is the name of your ship?", "Arr, she is Gertrude, terror of the seas.")
    made.look()
    assert len(made.store.candidates(10)) == 1
    assert "nearly the same as" in str(made.reasons())


def test_an_exchange_that_the_model_refuses_to_read_is_passed_over_once(made: Made) -> None:
    def refuses(messages: Any, text: str) -> float:
        raise InvalidRequest("vLLM refused it: too long")

    made.model.holds = refuses
    made.hear()
    assert made.look() is True and made.look() is False
    assert made.reasons() == ["vLLM refused it: too long"]


def test_a_fault_of_ours_ends_neither_the_loop_nor_the_next_exchange(made: Made) -> None:
    def breaks(messages: Any, text: str) -> float:
        raise KeyError("logprob")

    made.hear("Why 1?")
    made.hear("Why 2?")
    fine, made.model.holds = made.model.holds, breaks
    assert made.look() is True
    made.model.holds = fine
    assert made.look() is True
    assert sorted(map(str, made.reasons())) == ["None", "scoring broke off: KeyError"]


def test_while_the_model_does_not_answer_nothing_is_lost(made: Made) -> None:
    def gone(messages: Any, text: str) -> float:
        raise Unavailable("the model did not answer")

    made.hear()
    fine, made.model.holds = made.model.holds, gone
    with pytest.raises(Unavailable):
        made.look()
    made.model.holds = fine
    made.look()
    assert len(made.store.candidates(10)) == 1


def test_too_many_candidates_hold_further_ones_back(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "MAX_PROPOSED", 1)
    made.hear("Why 1?")
    made.hear("Who is there?", "Arr, me.")
    made.look(2)
    assert len(made.store.candidates(10)) == 1
    assert "1 candidates wait for a decision" in made.reasons()


def test_what_cannot_be_learned_is_not_kept(made: Made) -> None:
    plain = json.dumps({"messages": [{"role": "user", "content": "Why?"}]}).encode()
    reply = b'{"choices": [{"message": {"content": "So."}, "finish_reason": "stop"}]}'
    assert made.signal.hear([Exchange(plain, reply, False, 1, 1, True, 1.0)]) == 0
    assert made.store.conversations(10) == []


# Deciding.


def test_an_approved_candidate_is_one_sample_of_its_conversation(made: Made) -> None:
    candidate = made.candidate()
    approved = run(made.signal.decide(candidate.id, "approve"))
    assert (approved.state, approved.job_id) == ("approved", f"job-{candidate.id}")
    (sample,) = made.cell.trained
    assert (sample.id, sample.source) == (candidate.id, f"conversation:{candidate.conversation}")
    assert [each.strip for each in sample.messages] == [True, False, False]
    assert sample.messages[-1].content == candidate.answer
    assert made.cell.configs[0].learning_rate == DreamSettings().learning_rate


def test_an_approval_that_is_said_again_or_after_a_crash_trains_nothing_twice(made: Made) -> None:
    candidate = made.candidate()
    run(made.signal.decide(candidate.id, "approve"))
    run(made.signal.decide(candidate.id, "approve"))
    made.store._db.execute("UPDATE candidates SET job_id = NULL")  # As if killed before it was set.
    assert made.look() is True and made.look() is False
    assert made.store.candidate(candidate.id).job_id == f"job-{candidate.id}"
    assert len(made.cell.trained) == 1


def test_an_approval_holds_where_the_trainer_is_away_and_is_queued_later(made: Made) -> None:
    candidate = made.candidate()
    for error in (Unavailable("the cell restarts"), TooBusy("4096 samples are queued")):
        made.cell.error = error
        approved = run(made.signal.decide(candidate.id, "approve"))
        assert (approved.state, approved.job_id) == ("approved", None)
        with pytest.raises(type(error)):
            made.look()
    made.cell.error = None
    assert made.look() is True
    assert made.store.candidate(candidate.id).job_id is not None


def test_a_sample_that_the_trainer_refuses_is_rejected_with_its_words(made: Made) -> None:
    candidate = made.candidate()
    made.cell.error = InvalidRequest("samples[0]: too many tokens")
    rejected = run(made.signal.decide(candidate.id, "approve"))
    assert (rejected.state, rejected.reason) == ("rejected", "samples[0]: too many tokens")


def test_of_two_approvals_at_once_only_one_asks_the_trainer(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = made.candidate()
    made.cell.error = InvalidRequest("samples[0]: too many tokens")
    num_asked = 0
    train = made.cell.train

    async def slowly(*given: Any) -> str:
        nonlocal num_asked
        num_asked += 1
        await asyncio.sleep(0.01)
        return await train(*given)

    async def story() -> None:
        approve = (made.signal.decide(candidate.id, "approve") for _ in range(2))
        await asyncio.gather(*approve)

    monkeypatch.setattr(made.cell, "train", slowly)
    asyncio.run(story())
    assert num_asked == 1 and made.store.candidate(candidate.id).state == "rejected"


def test_a_candidate_is_trained_when_its_job_is_done(made: Made) -> None:
    candidate = made.candidate()
    job_id = run(made.signal.decide(candidate.id, "approve")).job_id
    assert made.look() is False, "it is not at its end"
    made.cell.jobs[job_id] = job(job_id, "done", steps=2, before=7, after=9)
    assert made.look() is True and made.look() is False
    trained = made.store.candidate(candidate.id)
    assert (trained.state, trained.span) == ("trained", (7, 9))


def test_a_candidate_whose_job_failed_is_rejected_and_says_why(made: Made) -> None:
    candidate = made.candidate()
    job_id = run(made.signal.decide(candidate.id, "approve")).job_id
    made.cell.jobs[job_id] = job(job_id, "cancelled")
    made.look()
    assert made.store.candidate(candidate.id).reason == "its job was cancelled: on request"


def test_a_ledger_that_does_not_know_the_job_gets_the_sample_again(made: Made) -> None:
    candidate = made.candidate()
    job_id = run(made.signal.decide(candidate.id, "approve")).job_id
    made.cell.jobs.clear()
    made.cell.trained.clear()
    made.look()
    assert len(made.cell.trained) == 1 and job_id in made.cell.jobs


def test_a_rejected_candidate_is_never_learned(made: Made) -> None:
    candidate = made.candidate()
    assert run(made.signal.decide(candidate.id, "reject")).state == "rejected"
    with pytest.raises(Conflict, match="is rejected already"):
        run(made.signal.decide(candidate.id, "approve"))
    with pytest.raises(NotFound):
        run(made.signal.decide("candidate-0", "approve"))
    assert made.look() is False and made.cell.trained == []


def test_within_the_days_budget_candidates_are_approved_and_learned_by_themselves(
    automatic: Made,
) -> None:
    automatic.hear("Why 1?")
    automatic.hear("Who is there?", "Arr, me.")
    automatic.look(3)
    proposed, approved = sorted(automatic.store.candidates(10), key=lambda each: each.is_automatic)
    assert (approved.state, proposed.state) == ("approved", "proposed")
    assert [each.id for each in automatic.cell.trained] == [approved.id]
    assert automatic.cell.configs[0].objective == "distill"
    assert automatic.cell.configs[0].epochs == 3


@pytest.mark.parametrize("why", ["may not teach", "too far away"])
def test_what_a_client_may_not_teach_or_is_too_far_away_waits_for_a_person(
    automatic: Made, why: str
) -> None:
    if why == "too far away":
        automatic.model.holds = lambda messages, text: 4 * holds(messages, text)
    automatic.hear(may_teach=why != "may not teach")
    automatic.look()
    assert [each.state for each in automatic.store.candidates(10)] == ["proposed"]


# Deleting.


def generation(number: int, version: int) -> GenerationView:
    parent = number - 1 if number else None
    return GenerationView(number, "delta", parent, version, 0.0, 1, False, False, None, "")


def test_deleting_names_the_generations_that_have_learned_from_it(made: Made) -> None:
    candidate = made.candidate()
    job_id = run(made.signal.decide(candidate.id, "approve")).job_id
    made.cell.jobs[job_id] = job(job_id, "done", steps=2, before=7, after=9)
    made.look()
    made.cell.kept = [generation(2, 12), generation(1, 9), generation(0, 7)]
    done = run(made.signal.delete(candidate.conversation))
    assert (done.generations, done.cancelled_jobs) == ((2, 1), ())
    assert (done.num_exchanges, done.candidates) == (1, (candidate.id,))
    assert made.store.candidates(10) == [] and made.store.conversations(10) == []
    with pytest.raises(NotFound, match="GET /conversations"):
        run(made.signal.delete(candidate.conversation))


def test_what_was_undone_and_learned_again_is_found_on_both_ways(made: Made) -> None:
    candidate = made.candidate()
    job_id = run(made.signal.decide(candidate.id, "approve")).job_id
    made.cell.jobs[job_id] = job(job_id, "done", steps=2, before=7, after=9)
    made.look()
    made.cell.jobs[job_id] = job(job_id, "done", steps=2, before=11, after=13)
    back = GenerationView(2, "return", 1, 11, 0.0, 1, False, False, 0, "")
    made.cell.kept = [generation(3, 13), back, generation(1, 9), generation(0, 7)]
    assert run(made.signal.delete(candidate.conversation)).generations == (3, 1)


def test_deleting_cancels_what_is_on_its_way(made: Made) -> None:
    candidate = made.candidate()
    job_id = run(made.signal.decide(candidate.id, "approve")).job_id
    made.cell.kept = [generation(1, 10), generation(0, 9)]
    done = run(made.signal.delete(candidate.conversation))
    assert done.cancelled_jobs == (job_id,)
    assert done.generations == (1,), "one step was made before it was cancelled"


def test_if_a_job_does_not_end_nothing_is_deleted(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = made.candidate()
    run(made.signal.decide(candidate.id, "approve"))
    monkeypatch.setattr(signals, "CANCEL_TIMEOUT_S", 0.1)
    made.cell.error = RuntimeError("deaf")
    with pytest.raises(Unavailable, match="nothing was deleted: try again"):
        run(made.signal.delete(candidate.conversation))
    assert made.store.candidate(candidate.id).state == "approved"


def test_a_conversation_that_is_deleted_while_it_is_being_approved_is_not_learned_after(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = made.candidate()
    begun = asyncio.Event()
    train = made.cell.train

    async def slowly(*given: Any) -> str:
        begun.set()
        await asyncio.sleep(0.05)
        return await train(*given)

    async def story() -> Any:
        approving = asyncio.create_task(made.signal.decide(candidate.id, "approve"))
        await begun.wait()
        done = await made.signal.delete(candidate.conversation)
        await approving
        return done

    monkeypatch.setattr(made.cell, "train", slowly)
    done = asyncio.run(story())
    assert done.cancelled_jobs == (f"job-{candidate.id}",), "it was queued, and then cancelled"
    assert made.store.conversations(10) == []


def test_bounds_agree() -> None:
    assert conversations.MAX_PROPOSED < conversations.MAX_EXCHANGES
    assert signals.MAX_COMPARED <= conversations.MAX_EXCHANGES
    assert LimitSettings().control_timeout_s > signals.CANCEL_TIMEOUT_S
