"""One dream round, from its first scenario to what becomes of it.

    imagine -> mix -> train -> gate --passes--> keep (commit)
                        ^        |
                        |        +--outside a budget--> take back --twice--> the behaviour stops
                        +---- half the rate, once ------------+

Every arrow is on disk before it is followed, so that a round that was cut short goes on where it
was: items are saved one scenario at a time, the ledger knows a sample by its id, and what was not
committed is gone with the weights and trained again.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Protocol

from actors.dream import library
from actors.dream.behaviour import Behaviour
from actors.dream.curriculum import Progress, after_test, due
from actors.dream.gate import MEASURE, Gate, Measurement, Record, faults
from actors.dream.imagining import Imagination
from actors.dream.manners import PoliteModel
from actors.dream.records import Attempt, Item, Round
from actors.dream.store import DreamStore
from actors.dream.together import together
from actors.errors import Conflict
from actors.messages import JobView
from actors.posted import ChatSample, TrainConfig
from actors.settings import DreamSettings

log = logging.getLogger(__name__)

NUM_TRIES: Final = 2
POLL_INTERVAL_S: Final = 0.25
MAX_TESTED: Final = 4
"""Most behaviours besides the round's own that are tested after it."""
REPLAY_TOKENS: Final = 32
"""Of one of the base's answers; as long as a short answer, so that it does not outweigh one."""
NEUTRAL: Final = "You are a helpful assistant."
"""What the teacher reads where a replayed answer is learned by distillation."""
WARMUP_STEPS: Final = 5


class Cell(Protocol):
    """The rest of the cell, as a round needs it. Each call raises a ReverieError if it fails."""

    def weights_version(self) -> int: ...

    async def commit(self) -> int:
        """Keep what there is; returns the generation."""
        ...

    async def train(self, round_id: str, samples: Sequence[ChatSample], config: TrainConfig) -> str:
        """Queue the samples; returns the job, the same one for the same samples."""
        ...

    async def job(self, job_id: str) -> JobView: ...

    async def cancel(self, job_id: str) -> None: ...

    async def keep(self, round_id: str) -> None:
        """The round has passed: commit it."""
        ...

    async def take_back(self, round_id: str, sample_ids: Sequence[str]) -> None:
        """Forget the samples; what else was learned since is learned again."""
        ...


@dataclass
class Dream:
    """Runs one round to its end."""

    model: PoliteModel
    store: DreamStore
    settings: DreamSettings
    cell: Cell
    tell: Callable[[str, int, int], None]

    async def run(self, of: Round) -> Round:
        """Blocks until the round has ended; cancelled, it can be run again later."""
        behaviour, progress = self.store.behaviour(of.behaviour)
        imagination = self._imagination(behaviour)
        if of.state == "imagining":
            if of.generation is None:
                of.generation = await self.cell.commit()
                self.store.save_round(of)
            with _Clock(self, of, "recording"):
                record = await self.record()
            with _Clock(self, of, "imagining"):
                await self._look_before(of, imagination, record)
                await imagination.imagine(of)
                self._mix(of)
                of.counts = _counts(self.store.items(of.id))
                is_enough = of.counts["kept"] >= self.settings.min_kept
                of.state = "training" if is_enough else "empty"
                of.reason = None if is_enough else self._why_empty(of)
        self.store.save_round(of)
        while not of.is_ended:
            await self._try(of, imagination)
            self.store.save_round(of)
        self._conclude(of, progress)
        return of

    # What the model is like before.

    async def record(self) -> Record:
        """The base that the gate compares with; made when it is first asked for."""
        known = self._recorded()
        if known is not None:
            return known if known.measure == MEASURE else await self._renew(known)
        self.tell("recording the base", 0, 1)
        made = await self._gate().record(self.cell.weights_version())
        prompts = library.general()[: self.settings.canaries]
        answers = await together(list(map(self._base_answer, prompts)))
        self.store.write_note("replay", [row for row in answers if row["answer"]])
        self.store.write_note("record", made.as_json())
        return made

    def _recorded(self) -> Record | None:
        note = self.store.note("record")
        known = None if note is None else Record.from_json(note)
        if known is not None and len(known.answers) != self.settings.canaries:
            raise Conflict(
                f"dream.canaries={self.settings.canaries}, but the base was recorded with "
                f"{len(known.answers)}: set it back"
            ).about("dream.canaries")
        return known

    async def _renew(self, known: Record) -> Record:
        log.warning("the base's numbers mean something else now: most are taken anew")
        self.tell("recording the base anew", 0, 1)
        renewed = await self._gate().renew(known, self.cell.weights_version())
        self.store.write_note("last", None)  # It was measured as the old record was.
        self.store.write_note("record", renewed.as_json())
        return renewed

    async def _base_answer(self, prompt: str) -> dict[str, str]:
        (answer,) = await self.model.answer(
            [{"role": "user", "content": prompt}], max_tokens=REPLAY_TOKENS
        )
        whole_words = answer.text if answer.is_finished else answer.text.rpartition(" ")[0].strip()
        return {"prompt": prompt, "answer": whole_words}

    async def _look_before(self, of: Round, imagination: Imagination, record: Record) -> None:
        version, last = self.cell.weights_version(), self.store.note("last") or {}
        if last.get("version") != version:
            is_base = record.weights_version == version
            measured = record.measured if is_base else await self._gate().measure(record)
            last = {"version": version, "measured": asdict(measured), "success": {}}
        for name, behaviour in self._tested(of, imagination.behaviour).items():
            if name not in last["success"]:
                self.tell(f"testing {name}", 0, 1)
                last["success"][name] = await self._imagination(behaviour).success()
        self.store.write_note("last", last)
        of.before, of.success_before = last["measured"], last["success"]

    def _tested(self, of: Round, focus: Behaviour) -> dict[str, Behaviour]:
        """The round's behaviour, those due for a test, and others that have been dreamt of."""
        everyone = {each.name: (each, progress) for each, progress in self.store.behaviours()}
        known = [progress for _, progress in everyone.values() if progress.tested_round]
        soon = [each.name for each in due(known, of.number)]
        rest = sorted(known, key=lambda each: each.tested_round)
        names = dict.fromkeys([*soon, *(each.name for each in rest)])
        names.pop(focus.name, None)
        chosen = {name: everyone[name][0] for name in list(names)[:MAX_TESTED]}
        return {focus.name: focus, **chosen}

    # What is learned.

    def _mix(self, of: Round) -> None:
        """Save, beside the new items, some of other behaviours and some of the base's answers."""
        items = self.store.items(of.id)
        num_new = sum(item.is_kept and item.kind == "new" for item in items)
        rng = random.Random(self.settings.seed + of.number)
        there = {behaviour.name for behaviour, _ in self.store.behaviours()}
        learned = self.store.learned(besides=of.behaviour)
        known = [item for item in learned if item.behaviour in there]
        rehearsed = rng.sample(known, min(len(known), round(self.settings.rehearsal * num_new)))
        answers = self.store.note("replay") or []
        replayed = rng.sample(answers, min(len(answers), round(self.settings.replay * num_new)))
        mixed = [
            replace(item, id=f"{of.id}-rehearsal-{at}", round_id=of.id, kind="rehearsal")
            for at, item in enumerate(rehearsed)
        ]
        for at, row in enumerate(replayed):
            number = f"{of.id}-replay-{at}"
            self.store.save_items(
                [Item(number, of.id, "", "replay", row["prompt"], row["answer"], is_kept=True)]
            )
        self.store.save_items(mixed)

    def _why_empty(self, of: Round) -> str:
        dropped = {key: count for key, count in of.counts.items() if key.startswith("dropped")}
        return (
            f"{of.counts['kept']} answers were worth learning, at least "
            f"dream.min_kept={self.settings.min_kept}: "
            + ", ".join(f"{count} {key}" for key, count in dropped.items())
        )

    def _samples(self, of: Round, number: int) -> list[ChatSample]:
        kept = [item for item in self.store.items(of.id) if item.is_kept]
        random.Random(self.settings.seed + of.number).shuffle(kept)
        return [self._sample(item, number) for item in kept]

    def _sample(self, item: Item, number: int) -> ChatSample:
        if item.kind != "replay":
            in_view = self.store.behaviour(item.behaviour)[0].in_view(item.memories)
        elif self.settings.objective == "distill":
            in_view = [{"role": "system", "content": NEUTRAL}]
        else:
            in_view = []
        turns = [
            {"role": "user", "content": item.situation},
            {"role": "assistant", "content": item.answer},
        ]
        messages = [{**each, "strip": True} for each in in_view] + turns
        return ChatSample.model_validate(
            {
                "id": f"{item.id}-try-{number}",
                "source": f"dream:{item.round_id}",
                "messages": messages,
                # How long answers are is a behaviour's to say, not the replay's.
                "is_finished": item.kind != "replay",
            }
        )

    # Training, and the gate.

    async def _try(self, of: Round, imagination: Imagination) -> None:
        """Train and judge once; or, after an interruption, go on with that."""
        if of.state == "training":
            number = 1 + len(of.attempts)
            rate = self.settings.learning_rate / 2 ** (number - 1)
            config = TrainConfig(
                learning_rate=rate,
                epochs=self.settings.epochs,
                warmup_steps=WARMUP_STEPS,
                objective=self.settings.objective,
            )
            job_id = await self.cell.train(of.id, self._samples(of, number), config)
            of.attempts.append(Attempt(rate, job_id))
            of.state = "judging"
            self.store.save_round(of)
        attempt = of.attempts[-1]
        with _Clock(self, of, "training"):
            job = await self._follow(attempt.job_id)
        if job.status == "done" and not attempt.faults:
            attempt = replace(attempt, loss_history=job.loss_history)
            with _Clock(self, of, "judging"):
                attempt = await self._judge(of, attempt, imagination)
            of.attempts[-1] = attempt
            self.store.save_round(of)
        is_refused = bool(attempt.faults) and self.settings.is_gated
        if job.status == "done" and not is_refused:
            await self.cell.keep(of.id)
            self._remember(attempt)
            of.state = "passed"
            return
        if job.steps:  # Else it is taken back already, by us or by a client's return.
            await self._take_back(of)
        if is_refused and len(of.attempts) < NUM_TRIES:
            of.state = "training"
            return
        self.store.mark_items(of.id)
        of.state = "taken back" if is_refused else "failed"
        why = f"its job was {job.status}: {job.error or 'on request'}"
        of.reason = "; ".join(attempt.faults) if is_refused else why

    async def _take_back(self, of: Round) -> None:
        ids = [sample.id or "" for sample in self._samples(of, len(of.attempts))]
        await self.cell.take_back(of.id, ids)

    async def give_up(self, of: Round) -> None:
        """End the round's training, and take back what it has taught."""
        job = await self.cell.job(of.attempts[-1].job_id)
        if job.status in ("queued", "training"):
            await self.cell.cancel(job.job_id)
            job = await self._follow(job.job_id)
        if job.steps and of.state != "passed":
            await self._take_back(of)
        self.store.mark_items(of.id)

    async def _follow(self, job_id: str) -> JobView:
        while True:
            job = await self.cell.job(job_id)
            self.tell("steps", job.steps, job.total_steps)
            if job.status in ("done", "failed", "cancelled"):
                return job
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _judge(self, of: Round, attempt: Attempt, imagination: Imagination) -> Attempt:
        self.tell("gate", 0, 1)
        record = self._recorded()
        if record is None or record.measure != MEASURE:
            raise Conflict("it began when the gate's numbers meant something else: ask for another")
        tested = self._tested(of, imagination.behaviour)
        asked: list[Awaitable[Any]] = [self._gate().measure(record)]
        asked += [self._imagination(behaviour).success() for behaviour in tested.values()]
        measured, *shares = await together(asked)
        success = dict(zip(tested, shares, strict=True))
        both = {
            name: (of.success_before[name], now)
            for name, now in success.items()
            if name in of.success_before
        }
        assert of.before is not None, "it was measured before"
        before = Measurement(**of.before)
        found = faults(record.measured, before, measured, self.settings.budgets, both)
        return replace(attempt, measured=asdict(measured), success=success, faults=found)

    def _remember(self, attempt: Attempt) -> None:
        """What was measured is what the next round begins with, while nobody else teaches."""
        self.store.write_note(
            "last",
            {
                "version": self.cell.weights_version(),
                "measured": attempt.measured,
                "success": attempt.success,
            },
        )

    def _conclude(self, of: Round, progress: Progress) -> None:
        """What the round says of the behaviours; then it is over."""
        if of.state == "passed":
            last = of.attempts[-1]
            for each, before in self.store.behaviours():
                if each.name in (last.success or {}):
                    now = (last.success or {})[each.name]
                    self.store.set_progress(after_test(before, now, of.number))
        elif of.state == "empty" and of.success_before:
            self.store.set_progress(after_test(progress, self._shown(of), of.number))
        elif of.state == "taken back":
            self.store.set_progress(replace(progress, standing="stopped", tested_round=of.number))
        of.ended = time.time()
        self.store.save_round(of)

    def _shown(self, of: Round) -> float:
        """Share of all situations in which it shows by itself, of a round that taught nothing.

        What it has invented was never learned from, so it tests as the held-out situations do;
        with those few alone, a behaviour just below its target would be dreamt of for ever.
        """
        answered = [item for item in self.store.items(of.id) if item.kind == "new" and item.answer]
        invented = {item.scenario for item in answered}
        showing = invented - {item.scenario for item in answered if item.is_candidate}
        held_out = self.settings.held_out
        shown = of.success_before[of.behaviour] * held_out + len(showing)
        return shown / (held_out + len(invented))

    def _gate(self) -> Gate:
        every = len(library.canaries()) // self.settings.canaries
        return Gate(self.model, library.canaries()[::every], library.pushback()[::every])

    def _imagination(self, behaviour: Behaviour) -> Imagination:
        return Imagination(self.model, self.store, self.settings, behaviour, self.tell)


class _Clock:
    """Adds the seconds and tokens of a stage to its round, waiting not counted."""

    def __init__(self, dream: Dream, of: Round, stage: str) -> None:
        self._dream, self._of, self._stage = dream, of, stage

    def __enter__(self) -> None:
        model = self._dream.model
        self._begun = time.monotonic() - model.waited_s
        self._tokens = model.num_tokens

    def __exit__(self, *error: Any) -> None:
        model = self._dream.model
        seconds = time.monotonic() - model.waited_s - self._begun
        known = self._of.seconds.get(self._stage, 0.0)
        self._of.seconds[self._stage] = round(known + seconds, 2)
        self._of.tokens += model.num_tokens - self._tokens


def _counts(items: Sequence[Item]) -> dict[str, int]:
    new = [item for item in items if item.kind == "new"]
    reasons = Counter(
        (item.reason or "").split(":")[0] for item in new if not item.is_kept and item.reason
    )
    return {
        "scenarios": len({item.scenario for item in new}),
        "kept": sum(item.is_kept for item in new),
        **{item.kind: sum(each.kind == item.kind for each in items) for item in items},
        **{f"dropped, {reason}": count for reason, count in reasons.most_common(12)},
    }
