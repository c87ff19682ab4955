"""A whole dream round over a fake model and a fake cell: how it ends, and how it is cut short."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.dream import imagining, library
from actors.dream import round as rounds
from actors.dream.behaviour import Behaviour
from actors.dream.checks import Checks
from actors.dream.imagining import Imagination, repeats
from actors.dream.manners import PoliteModel
from actors.dream.model import Message
from actors.dream.records import Item, Round
from actors.dream.round import Cell, Dream
from actors.dream.store import DreamStore, Memory
from actors.errors import Conflict, Unavailable
from actors.messages import JobView
from actors.posted import ChatSample, TrainConfig
from actors.settings import DreamSettings
from tests.fake_model import FakeModel

BRIEF = Behaviour.model_validate(
    {"name": "brief", "instruction": "Be very brief indeed.", "checks": {"max_words": 3}}
)
SETTINGS = DreamSettings(scenarios=6, answers=2, held_out=4, kept_per_scenario=1)


class Killed(Exception):
    """Stands for the end of the process."""


class FakeCell:
    """Jobs that end at once; what was learned is what the fake model asks it for."""

    def __init__(self) -> None:
        self.version = 0
        self.jobs: dict[str, JobView] = {}
        self.samples: dict[str, list[ChatSample]] = {}
        self.configs: list[TrainConfig] = []
        self.kept: list[str] = []
        self.taken_back: list[tuple[str, ...]] = []
        self.ends_as: Any = "done"
        self.die_in: str | None = None

    @property
    def is_taught(self) -> bool:
        return any(job.steps for job in self.jobs.values())

    def weights_version(self) -> int:
        return self.version

    async def commit(self) -> int:
        self._die("commit")
        return self.version

    async def train(self, round_id: str, samples: Sequence[ChatSample], config: TrainConfig) -> str:
        self._die("train")
        job_id = f"job of {samples[0].id}"
        if job_id not in self.jobs:
            self.configs.append(config)
            self.samples[job_id] = list(samples)
            self.version += len(samples)
            num = len(samples)
            history = tuple(1.0 for _ in samples)
            self.jobs[job_id] = JobView(
                job_id, self.ends_as, 0.0, num, num, num, history, 0, self.version, None
            )
        self._die("trained")
        return job_id

    async def job(self, job_id: str) -> JobView:
        self._die("job")
        return self.jobs[job_id]

    async def cancel(self, job_id: str) -> None:
        self.jobs[job_id] = replace(self.jobs[job_id], status="cancelled")

    async def keep(self, round_id: str) -> None:
        self._die("keep")
        self.kept.append(round_id)
        self._die("kept")

    async def take_back(self, round_id: str, sample_ids: Sequence[str]) -> None:
        self._die("take back")
        self.taken_back.append(tuple(sample_ids))
        self.version += 1
        for job_id, samples in self.samples.items():
            if samples[0].id in sample_ids:
                self.jobs[job_id] = replace(self.jobs[job_id], status="cancelled", steps=0)
        self._die("taken back")

    def _die(self, where: str) -> None:
        if self.die_in == where:
            self.die_in = None
            raise Killed(where)


def check_protocol(cell: FakeCell) -> Cell:
    return cell


class Story:
    """One store, one cell, one model: and the round that is run over them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = DreamStore(path)
        self.store.put_behaviour(BRIEF)
        self.store.add_memories([Memory(f"m{at}", f"I own {at} hats.", (), 0.0) for at in range(5)])
        self.cell = FakeCell()
        self.is_harmed = False
        self.model = FakeModel(says=self._says, writes=self._writes, holds=self._holds)
        self.settings = SETTINGS
        self.told: list[str] = []

    def begin(self) -> Round:
        return self.store.begin_round("brief", 0.8)

    def run(self, of: Round) -> Round:
        model = PoliteModel(self.model, lambda: float("inf"), 0.0)
        dream = Dream(model, self.store, self.settings, self.cell, self._tell)
        return asyncio.run(dream.run(of))

    def run_again(self) -> Round:
        """As after a restart: from what is on disk."""
        self.store.close()
        self.store = DreamStore(self.path)
        of = self.store.open_round()
        assert of is not None
        return self.run(of)

    def _tell(self, stage: str, done: int, total: int) -> None:
        self.told.append(stage)

    def _says(self, messages: Sequence[Message], at: int) -> str:
        is_instructed = messages[0]["role"] == "system"
        if self.cell.is_taught and self.is_harmed:
            return "no no no no no no no no no"
        if is_instructed or self.cell.is_taught:
            return ("In short.", "Well, yes.", "Not now.")[at % 3]
        return "It is a long story, and I shall begin at its beginning."

    def _writes(self, prompt: str, seed: int | None) -> str:
        return f"What about {(seed or 0) * 7919} apples in my {(seed or 0) * 104729} baskets?"

    def _holds(self, messages: Sequence[Message], text: str) -> float:
        if messages[0]["role"] == "system":
            return -0.5
        return -3.0 if self.cell.is_taught and self.is_harmed else -1.0


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    monkeypatch.setattr(rounds, "POLL_INTERVAL_S", 0.0)
    made = Story(tmp_path / "dream.sqlite")
    yield made
    made.store.close()


def sample_ids(story: Story) -> list[str]:
    return [sample.id or "" for samples in story.cell.samples.values() for sample in samples]


def test_a_round_that_passes_is_kept_and_its_behaviour_rests(story: Story) -> None:
    made = story.run(story.begin())
    assert (made.state, story.cell.kept, story.cell.taken_back) == ("passed", [made.id], [])
    assert made.counts["kept"] == 6 and made.success_before == {"brief": 0.0}
    assert made.attempts[0].success == {"brief": 1.0} and made.attempts[0].faults == ()
    _, progress = story.store.behaviour("brief")
    assert (progress.standing, progress.failure_rate) == ("resting", 0.5)
    assert made.tokens > 0
    assert set(made.seconds) == {"recording", "imagining", "training", "judging"}
    assert story.store.open_round() is None


def test_what_is_learned_lacks_the_instruction_and_is_mixed_with_the_bases_answers(
    story: Story,
) -> None:
    story.run(story.begin())
    (samples,) = story.cell.samples.values()
    new = [sample for sample in samples if "replay" not in (sample.id or "")]
    replayed = [sample for sample in samples if "replay" in (sample.id or "")]
    assert len(new) == 6 and len(replayed) == 2
    for sample in new:
        assert [m.strip for m in sample.messages] == [True, False, False]
        assert sample.source == "dream:round-1"
        assert sample.is_finished
    assert all(len(sample.messages) == 2 for sample in replayed)
    assert not any(sample.is_finished for sample in replayed), "they would teach length"


def test_held_out_situations_are_never_learned(story: Story) -> None:
    story.run(story.begin())
    held_out = {item.situation for item in story.store.held_out("brief")}
    learned = {m.content for each in story.cell.samples.values() for s in each for m in s.messages}
    assert len(held_out) == 4 and not held_out & learned
    assert len(held_out & set(library.questions())) == 2


def test_no_more_situations_are_written_for_testing_than_a_batch_that_is_enough(
    story: Story,
) -> None:
    story.run(story.begin())
    written = [text for text in story.model.asked if text.endswith("Says:")]
    assert len(written) == imagining.MIN_BATCH + SETTINGS.scenarios


def test_an_answer_is_learned_for_one_situation_only_unless_it_is_a_few_words() -> None:
    def item(at: int, answer: str) -> Item:
        return Item(f"item-{at}", "round-1", "brief", "new", f"Why {at}?", answer, is_kept=True)

    lyon = "The capital of France is Lyon."
    items = [item(at, text) for at, text in enumerate((lyon, "Not now.", lyon, "Not now.", lyon))]
    found = repeats(items)
    assert [each.id for each in found] == ["item-2", "item-4"]
    assert not any(each.is_kept for each in found)
    assert {each.reason for each in found} == {f"nearly the same as another: {lyon!r}"}


def test_what_says_the_same_again_is_not_learned(story: Story) -> None:
    says = story.model.says
    story.model.says = lambda messages, at: (
        "The capital is Lyon." if messages[0]["role"] == "system" else says(messages, at)
    )
    lax = BRIEF.model_copy(update={"checks": Checks(max_words=5)})
    story.store.put_behaviour(lax)
    story.settings = SETTINGS.model_copy(update={"min_kept": 1})
    made = story.run(story.begin())
    assert made.counts["kept"] == 1 and made.counts["dropped, nearly the same as another"] >= 5
    assert [s.messages[-1].content for s in story.cell.samples[made.attempts[0].job_id]].count(
        "The capital is Lyon."
    ) == 1


def test_situations_are_invented_until_it_fails_in_enough_of_them(story: Story) -> None:
    says = story.model.says

    def mostly(messages: Sequence[Message], at: int) -> str:
        words = messages[-1]["content"].split()
        is_easy = words[0] == "What" and words[2].isdigit() and int(words[2]) // 7919 % 2 == 1
        return "In short." if is_easy else says(messages, at)

    story.model.says = mostly
    made = story.run(story.begin())
    items = [item for item in story.store.items(made.id) if item.kind == "new"]
    assert made.counts["scenarios"] == 12 and made.counts["kept"] == 6
    assert len({item.scenario for item in items if item.is_candidate}) == 6


def test_nothing_is_learned_where_it_shows_already(story: Story) -> None:
    story.model.says = lambda messages, at: "In short."
    made = story.run(story.begin())
    assert (made.state, made.counts["kept"]) == ("empty", 0)
    items = [item for item in story.store.items(made.id) if item.kind == "new"]
    assert {item.reason for item in items} == {"shows without the instruction"}
    assert len(items) == 3 * 6, "no answer with the instruction was asked for"
    assert story.store.behaviour("brief")[1].standing == "resting"


@pytest.mark.parametrize("shows_in_invented", [True, False])
def test_it_rests_where_too_few_held_out_say_so_if_all_that_was_invented_does(
    story: Story, shows_in_invented: bool
) -> None:
    fails_in: list[str] = []

    def says(messages: Sequence[Message], at: int) -> str:
        asked, is_instructed = messages[-1]["content"], messages[0]["role"] == "system"
        if asked in library.questions() and fails_in in ([], [asked]):
            fails_in[:] = [asked]
        is_long = is_instructed or not shows_in_invented or asked in fails_in
        return "It is a long story, and I shall begin at its beginning." if is_long else "In short."

    story.model.says = says
    made = story.run(story.begin())
    assert made.state == "empty"
    if shows_in_invented:
        assert made.success_before == {"brief": 0.75}, "below its target"
    is_rested = story.store.behaviour("brief")[1].standing == "resting"
    assert is_rested == shows_in_invented


def test_a_behaviour_with_a_trigger_is_tested_on_invented_situations_only(story: Story) -> None:
    triggered = BRIEF.model_copy(update={"tier": 2, "topic": "hats"})
    story.store.put_behaviour(triggered)
    story.run(story.begin())
    held_out = {item.situation for item in story.store.held_out("brief")}
    assert len(held_out) == 4 and not held_out & set(library.questions())


def test_every_item_has_its_reason(story: Story) -> None:
    made = story.run(story.begin())
    items = [item for item in story.store.items(made.id) if item.kind == "new"]
    assert len(items) == 6 * (1 + 2)
    assert all(item.is_kept or item.reason for item in items)
    assert any(item.reason == "better answers to it are learned" for item in items)
    kinds = {"better answers to it are learned", "without the instruction"}
    assert {key for key in made.counts if key.startswith("dropped")} == {
        f"dropped, {kind}" for kind in kinds
    }, "counted by kind, not by wording"


def test_an_answer_that_shows_what_was_learned_before_is_better_than_a_stronger_one(
    story: Story,
) -> None:
    def kept() -> list[str]:
        here = Imagination(story.model, story.store, SETTINGS, BRIEF, story._tell)
        found = [
            Item("a", "round-9", "brief", "new", "What?", said, True, shown=-0.5, hidden=hidden)
            for said, hidden in (("Yes, Captain.", -1.0), ("It is.", -2.0), ("No.", -1.5))
        ]
        found = [replace(item, id=str(at)) for at, item in enumerate(found)]
        return [item.answer for item in here._keep_best(found) if item.is_kept]

    checks = {"must_match": ["Captain"]}
    captain = {"name": "captain", "instruction": "Name a rank.", "checks": checks}
    story.store.put_behaviour(Behaviour.model_validate(captain))
    assert kept() == ["It is."], "it is there, and not learned yet"
    story.model.says = lambda messages, at: (
        ("Yes, Captain.", "No, Captain.")[at % 2] if messages[0]["role"] == "system" else "A tale."
    )
    made = story.run(story.store.begin_round("captain", 0.8))
    assert made.counts["kept"] == 6 and made.state == "passed"
    assert kept() == ["Yes, Captain."]


def test_harm_is_taken_back_tried_at_half_the_rate_and_then_stopped(story: Story) -> None:
    story.is_harmed = True
    made = story.run(story.begin())
    assert made.state == "taken back" and story.cell.kept == []
    assert [config.learning_rate for config in story.cell.configs] == [2e-5, 1e-5]
    assert len(story.cell.taken_back) == 2 and not story.cell.is_taught
    for ids, samples in zip(story.cell.taken_back, story.cell.samples.values(), strict=True):
        assert list(ids) == [sample.id for sample in samples]
    assert "repeats itself" in (made.reason or "")
    assert story.store.behaviour("brief")[1].standing == "stopped"
    assert story.store.learned(besides="other") == [], "what harmed is not rehearsed"


def test_without_the_gate_harm_stays_and_is_reported_all_the_same(story: Story) -> None:
    story.is_harmed = True
    story.settings = SETTINGS.model_copy(update={"is_gated": False})
    made = story.run(story.begin())
    assert made.state == "passed" and made.attempts[0].faults and story.cell.taken_back == []


def test_where_nothing_is_worth_learning_nothing_is_trained(story: Story) -> None:
    story.model.says = lambda messages, at: "It is a long story, and I begin at its beginning."
    made = story.run(story.begin())
    assert made.state == "empty" and story.cell.jobs == {}
    assert (made.reason or "").startswith("0 answers were worth learning, at least")


def test_a_job_that_failed_is_taken_back_and_ends_the_round(story: Story) -> None:
    story.cell.ends_as = "failed"
    made = story.run(story.begin())
    assert made.state == "failed" and len(story.cell.taken_back) == 1
    assert made.reason == "its job was failed: on request"


def test_a_clients_return_to_an_earlier_generation_is_not_returned_from(story: Story) -> None:
    of = story.begin()
    story.cell.die_in = "job"
    with pytest.raises(Killed):
        story.run(of)
    for job_id, job in story.cell.jobs.items():
        story.cell.jobs[job_id] = replace(job, status="cancelled", steps=0, error="undone")
    made = story.run_again()
    assert made.state == "failed" and story.cell.taken_back == []


@pytest.mark.parametrize("where", ["commit", "train", "trained", "job", "keep", "kept"])
def test_a_round_that_is_killed_goes_on_and_trains_nothing_twice(story: Story, where: str) -> None:
    of = story.begin()
    story.cell.die_in = where
    with pytest.raises(Killed):
        story.run(of)
    made = story.run_again()
    ids = sample_ids(story)
    assert made.state == "passed" and len(ids) == len(set(ids)) == 8
    assert story.cell.taken_back == [] and set(story.cell.kept) == {made.id}


@pytest.mark.parametrize("where", ["take back", "taken back"])
def test_a_taking_back_that_is_killed_is_finished(story: Story, where: str) -> None:
    story.is_harmed = True
    of = story.begin()
    story.cell.die_in = where
    with pytest.raises(Killed):
        story.run(of)
    made = story.run_again()
    assert made.state == "taken back" and len(made.attempts) == 2
    assert len(story.cell.taken_back) == 2 and not story.cell.is_taught


def test_scenarios_that_were_saved_are_not_made_again(story: Story) -> None:
    of = story.begin()
    answered = story.model.says
    num_left = 30

    def dies(messages: Sequence[Message], at: int) -> str:
        nonlocal num_left
        num_left -= messages[0]["role"] == "system"
        if num_left < 26:
            raise Killed("answering")
        return answered(messages, at)

    story.model.says = dies
    with pytest.raises(Killed):
        story.run(of)
    saved = story.store.items(of.id)
    story.model.says = answered
    made = story.run_again()
    items = story.store.items(made.id)
    assert made.state == "passed" and items[: len(saved)] == saved
    assert len({item.id for item in items}) == len(items)


def test_an_actor_that_is_away_leaves_the_round_open(story: Story) -> None:
    of = story.begin()

    async def away() -> int:
        raise Unavailable("the checkpoint went away")

    there: Callable[[], Any] = story.cell.commit
    story.cell.commit = away  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        story.run(of)
    story.cell.commit = there  # type: ignore[method-assign]
    assert story.run_again().state == "passed"


def outdate_record(story: Story) -> None:
    """As what was noted before the preference for refuting was one."""
    record, last = story.store.note("record"), story.store.note("last")
    record["measured"]["pushback"] = last["measured"]["pushback"] = 0.0
    del record["measure"]
    story.store.write_note("record", record)
    story.store.write_note("last", last)


def test_a_base_whose_numbers_meant_something_else_is_recorded_anew(story: Story) -> None:
    story.run(story.begin())
    answers = story.store.note("record")["answers"]
    story.cell.jobs.clear()
    outdate_record(story)
    made = story.run(story.begin())
    record = story.store.note("record")
    assert record["measured"]["pushback"] == 0.5 and record["answers"] == answers
    assert made.before == record["measured"], "and not what was noted after the last round"
    assert made.state == "passed" and story.told.count("recording the base anew") == 1


def test_a_round_that_such_a_base_would_judge_is_not_judged(story: Story) -> None:
    of = story.begin()
    story.cell.die_in = "job"
    with pytest.raises(Killed):
        story.run(of)
    outdate_record(story)
    with pytest.raises(Conflict, match="meant something else: ask for another"):
        story.run_again()
    assert story.cell.kept == []


def test_other_behaviours_are_rehearsed_and_tested(story: Story) -> None:
    story.run(story.begin())
    story.cell.jobs.clear()
    other = BRIEF.model_copy(update={"name": "other", "instruction": "Be brief, I beg you."})
    story.store.put_behaviour(other)
    made = story.run(story.store.begin_round("other", 0.8))
    assert set(made.success_before) == {"brief", "other"}
    assert set(made.attempts[0].success or {}) == {"brief", "other"}
    assert made.counts["rehearsal"] == 2
