"""A round's first half: situations, answers, verdicts, and which of them are worth learning.

    seed -> scenario -> answer without the instruction --shows it--> nothing to learn here
                                  |does not
                                  v
             candidates with it -> filters -> judge -> divergence -> the best are kept

A scenario is saved when all that was found of it is known: what is interrupted goes on after the
last one that was saved. Knows no trainer and no gate.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from statistics import fmean
from typing import Final

from actors.dream import filters, library, scenario
from actors.dream.behaviour import Behaviour
from actors.dream.checks import Checks, failures
from actors.dream.judge import judge
from actors.dream.model import Answer, LiveModel, Message
from actors.dream.records import Item, Round
from actors.dream.scenario import Seed
from actors.dream.store import DreamStore
from actors.dream.together import as_answered, together
from actors.errors import InvalidRequest
from actors.settings import DreamSettings

SEEDS_PER_ROUND: Final = 10_000
"""Numbers of the draws of one round, so that no two rounds share one."""
MAX_TRIES: Final = 4
"""Times as many scenarios as are wanted for testing may be written until there are enough."""
INVENTED_PER_WANTED: Final = 3
"""Times as many situations as are wanted may be invented until it fails in enough of them."""
MIN_BATCH: Final = 8
"""Fewer at once leave the engine idle."""
MIN_WORDS_APART: Final = 4
"""An answer with so many words is learned for one situation only."""
SHOWS: Final = "shows without the instruction"
"""Reason not to learn of a situation."""
NO_MEMORIES: Final = ("I live in a small town.", "I like to learn new things.")
"""What scenarios are made from while there are no memories."""


@dataclass
class Imagination:
    """Invents for one behaviour."""

    model: LiveModel
    store: DreamStore
    settings: DreamSettings
    behaviour: Behaviour
    tell: Callable[[str, int, int], None]
    """Told a stage, how many are done, and of how many."""

    # Situations for testing.

    async def held_out(self) -> list[str]:
        """The situations that this behaviour is tested on; found when first asked for.

        Half of them are ordinary questions where any will do: invented ones alone are like those
        that are learned from, and odd.
        """
        known = [each.situation for each in self.store.held_out(self.behaviour.name)]
        wanted = self.settings.held_out
        if len(known) >= wanted:
            return known
        if self.behaviour.topic is None and not self.behaviour.uses_memories:
            questions = library.questions()
            rng = random.Random(self.settings.seed)
            for at in rng.sample(range(len(questions)), min(len(questions), wanted // 2)):
                if questions[at] not in known:
                    self._hold_out(f"question-{at}", questions[at], known)
        numbers = iter(range(self.settings.seed, self.settings.seed + MAX_TRIES * wanted))
        while (missing := wanted - len(known)) > 0:
            some = list(islice(numbers, max(MIN_BATCH, missing)))
            if not some:
                break
            written = await self._write(some, temperature=1.0)
            for number, text in written.items():
                if len(known) < wanted and self._fault(text, known) is None:
                    self._hold_out(str(number), text, known)
        return known

    def _hold_out(self, number: str, text: str, known: list[str]) -> None:
        name = self.behaviour.name
        item = Item(f"held-{name}-{number}", "", name, "held_out", text, "", is_kept=False)
        self.store.save_items([item])
        known.append(text)

    # Situations for learning.

    async def imagine(self, of: Round) -> list[Item]:
        """All items of the round; those that were saved by an earlier try are not made again.

        Goes on until there are enough situations in which the behaviour does not show yet.
        """
        wanted = self.settings.scenarios
        first = self.settings.seed + SEEDS_PER_ROUND * of.number
        done = {item.scenario for item in self.store.items(of.id)}
        numbers = (
            number
            for number in range(first, first + INVENTED_PER_WANTED * wanted)
            if number not in done
        )
        while (missing := wanted - self._num_failing(of)) > 0:
            some = list(islice(numbers, min(wanted, max(MIN_BATCH, missing))))
            if not some:
                break
            await self._invent(of, some)
        self.store.drop_items(repeats(self.store.items(of.id)))
        return self.store.items(of.id)

    def _num_failing(self, of: Round) -> int:
        """Situations in which the behaviour does not show yet."""
        items = self.store.items(of.id)
        return len({item.scenario for item in items if item.is_candidate})

    async def _invent(self, of: Round, numbers: Sequence[int]) -> None:
        """Situations of these numbers, with what became of the answers to each."""
        saved = self.store.items(of.id)
        self.tell("scenarios", 0, len(numbers))
        written = await self._write(numbers, of.temperature)
        apart = await self.held_out() + [item.situation for item in saved]
        asked = []
        for number, text in written.items():
            fault = self._fault(text, apart)
            apart.append(text)
            if fault is None:
                asked.append(self._answers(of, number, text))
            else:
                dropped = self._item(of, number, 0, text, "", f"scenario: {fault}")
                self.store.save_items([dropped])
        count = 0
        async with aclosing(as_answered(asked)) as answered:
            async for found in answered:
                count += 1
                self.store.save_items(found)
                self.tell("answers", count, len(asked))

    async def _write(self, numbers: Sequence[int], temperature: float) -> dict[int, str]:
        examples = [
            each
            for each in library.scenario_examples()
            if (each.topic is None) == (self.behaviour.topic is None)
        ]

        async def one(number: int) -> tuple[int, str]:
            seed = self._seed(number)
            text = await scenario.write(self.model, seed, self.behaviour, examples, temperature)
            return number, text

        return dict(await together(list(map(one, numbers))))

    def _seed(self, number: int) -> Seed:
        return scenario.collide(self._memories, number, random.Random(number))

    @cached_property
    def _memories(self) -> list[str]:
        """As they are when this is first asked for: a round's draws do not change under it."""
        return [memory.text for memory in self.store.memories()] or list(NO_MEMORIES)

    def _fault(self, text: str, others: Sequence[str]) -> str | None:
        return (
            scenario.fault(text)
            or filters.leak(text, self.behaviour.instruction)
            or filters.near_duplicate(text, others)
        )

    async def _answers(self, of: Round, number: int, text: str) -> list[Item]:
        """What became of each answer to one situation; the one without the instruction is first."""
        asks: list[Message] = [{"role": "user", "content": text}]
        in_view = self.behaviour.in_view(self._seed(number).memories)
        most = self.behaviour.max_tokens
        try:
            (plain,) = await self.model.answer(asks, max_tokens=most)
            verdict = await self._judge(text, plain.text)
            reason = SHOWS if verdict is None else f"without the instruction: {verdict}"
            items = [self._item(of, number, 0, text, plain.text, reason)]
            if verdict is None:
                return items
            found = await self.model.answer(
                [*in_view, *asks],
                n=self.settings.answers,
                temperature=of.temperature,
                max_tokens=most,
                seed=number,
            )
        except InvalidRequest as error:
            return [self._item(of, number, 0, text, "", str(error))]
        for at, answer in enumerate(found, 1):
            before = [item.answer for item in items[1:]]
            items.append(await self._weigh(of, number, at, text, answer, before))
        return self._keep_best(items)

    async def _weigh(
        self, of: Round, number: int, at: int, text: str, answer: Answer, before: Sequence[str]
    ) -> Item:
        made = self._item(of, number, at, text, answer.text, None)
        reason = (
            (None if answer.is_finished else "it did not come to its end")
            or filters.leak(answer.text, self.behaviour.instruction, text)
            or filters.repetition(answer.text)
            or filters.near_duplicate(answer.text, before)
        )
        if reason is None and (verdict := await self._judge(text, answer.text)):
            reason = f"does not show it: {verdict}"
        if reason is not None:
            return replace(made, reason=reason)
        asks: list[Message] = [{"role": "user", "content": text}]
        shown = answer.mean_logprob  # It was written with the instruction in view.
        hidden = fmean(await self.model.logprobs(asks, answer.token_ids))
        low, high = self.settings.min_divergence, self.settings.max_divergence
        reason = filters.divergence(shown, hidden, low, high)
        return replace(made, shown=shown, hidden=hidden, is_kept=reason is None, reason=reason)

    async def _judge(self, text: str, answer: str) -> str | None:
        """Why the answer does not show the behaviour; None if it does."""
        examples = library.judge_examples()
        verdict = await judge(self.model, self.behaviour, text, answer, examples)
        return None if verdict.is_good else "; ".join(verdict.reasons)

    def _keep_best(self, items: list[Item]) -> list[Item]:
        """Those that show most of what was learned before, so that it is not unlearned.

        Among equals, those that the instruction has changed most: they teach the instruction.
        """
        kept = sorted(
            (item for item in items if item.is_kept),
            key=lambda item: (self._num_shown(item.answer), item.divergence or 0.0),
            reverse=True,
        )
        too_many = {item.id for item in kept[self.settings.kept_per_scenario :]}
        return [
            replace(item, is_kept=False, reason="better answers to it are learned")
            if item.id in too_many
            else item
            for item in items
        ]

    def _num_shown(self, answer: str) -> int:
        """How many of the other behaviours that were learned it shows."""
        return sum(not failures(answer, checks) for checks in self._others)

    @cached_property
    def _others(self) -> list[Checks]:
        """Of those that hold for every situation; a rubric would cost a judgement each."""
        learned = self.store.learned_behaviours() - {self.behaviour.name}
        return [
            each.checks
            for each, progress in self.store.behaviours()
            # One that was replaced has been tested in no round yet, and has old items.
            if each.name in learned and progress.tested_round
            if each.checks is not None and each.topic is None
        ]

    def _item(
        self, of: Round, number: int, at: int, text: str, answer: str, reason: str | None
    ) -> Item:
        return Item(
            id=f"{of.id}-{number}-{at}",
            round_id=of.id,
            behaviour=self.behaviour.name,
            kind="new",
            situation=text,
            answer=answer,
            is_kept=False,
            reason=reason,
            scenario=number,
            memories=self._seed(number).memories,
        )

    # Testing.

    async def success(self) -> float:
        """Share of the held-out situations in which it shows, greedily, without the instruction."""
        situations = await self.held_out()
        assert situations, f"{self.behaviour.name}: no situation for testing could be written"
        shows = await together(list(map(self._shows, situations)))
        return sum(shows) / len(shows)

    async def _shows(self, text: str) -> bool:
        (answer,) = await self.model.answer(
            [{"role": "user", "content": text}], max_tokens=self.behaviour.max_tokens
        )
        return await self._judge(text, answer.text) is None


def repeats(items: Sequence[Item]) -> list[Item]:
    """Kept answers that say again what was kept for another situation, now dropped.

    An answer of a few words, such as a yes, may well be that of several questions.
    """
    said: list[str] = []
    found = []
    for item in items:
        if not item.is_kept or len(item.answer.split()) < MIN_WORDS_APART:
            continue
        if reason := filters.near_duplicate(item.answer, said):
            found.append(replace(item, is_kept=False, reason=reason))
        else:
            said.append(item.answer)
    return found
