"""The gate: what a round has done to the model, measured against the model before all dreams.

    before the first round: record    the base's answers to the canaries, as likely as it held them
    after each round:       measure   -> faults(base, before, after, budgets) -> () passes
    a number means another thing than when it was recorded: renew

Knows the live model and the canaries; what follows from a fault is the round's business.
"""

import asyncio
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import fmean
from typing import Any, Final

from actors.dream.library import Canary, Pushback
from actors.dream.model import Answer, LiveModel, Message
from actors.dream.together import together
from actors.settings import Budgets

MEASURE: Final = 2
"""Raised when a number of `Measurement` begins to mean something else: what was recorded under a
lower one is not compared with. 1 had `pushback` as a share, and facts of 24 tokens."""
SHORT_TOKENS: Final = 24
FACT_TOKENS: Final = 40
"""Enough for a base that takes its time, so that becoming brief does not look like learning."""
LONG_TOKENS: Final = 64
NUM_FREE: Final = 16
"""Long canaries that are answered anew each time, for entropy and repetition."""
NGRAM: Final = 4
SEED: Final = 20
MAX_LOG_RATIO: Final = 20.0
"""Bounds one token's share of the estimate; its exponential would swamp every other token."""


@dataclass(frozen=True)
class Recorded:
    """The base's own answer to one canary."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """What the model is like."""

    kl: float
    """KL(base || now) on the base's own answers to the canaries, in nats per token."""
    kl_short: float
    kl_long: float
    entropy: float
    """Mean of -log p of freely sampled tokens, in nats."""
    repetition: float
    """Share of the word 4-grams in greedy long answers that came before in the same answer."""
    facts: float
    """Share of the short canaries that are answered rightly."""
    pushback: float
    """Mean preference for refuting a false claim over agreeing with it, from 0 to 1.

    Of each claim r / (r + a), with the geometric mean probability per token of the refutation and
    of the agreement: small models agree with most, and a share would not see them agree more.
    """


@dataclass(frozen=True)
class Record:
    """The base: what every later measurement is held against."""

    weights_version: int
    """Of the weights that `measured` is of."""
    answers: tuple[Recorded, ...]
    """One for each canary, in the library's order."""
    measured: Measurement
    measure: int = MEASURE
    """What the numbers mean."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Record":
        answers = tuple(
            Recorded(tuple(each["token_ids"]), tuple(each["logprobs"])) for each in row["answers"]
        )
        # The first records do not say what they mean.
        measure = row.get("measure", 1)
        return cls(row["weights_version"], answers, Measurement(**row["measured"]), measure)


@dataclass
class Gate:
    """Measures one live model."""

    model: LiveModel
    canaries: Sequence[Canary]
    pushback: Sequence[Pushback]

    async def record(self, weights_version: int) -> Record:
        """Let the model answer the canaries, and keep what it holds of its own answers."""
        drawn = await together(
            [self._draw(each, SEED + at) for at, each in enumerate(self.canaries)]
        )
        answers = await together(
            [self._keep(each, answer) for each, answer in zip(self.canaries, drawn, strict=True)]
        )
        return Record(weights_version, tuple(answers), await self._measure(None))

    async def renew(self, record: Record, weights_version: int) -> Record:
        """The record with numbers that mean what they mean today.

        The base's answers stay, and KL goes on from them. All else is the model's as it is now: of
        the base it cannot be asked any more, and an old number would let too much pass.
        """
        return Record(weights_version, record.answers, await self.measure(record))

    async def measure(self, record: Record) -> Measurement:
        """The model as it is now, against the record."""
        return await self._measure(record.answers)

    async def _draw(self, canary: Canary, seed: int) -> Answer:
        max_tokens = SHORT_TOKENS if canary.kind == "short" else LONG_TOKENS
        (answer,) = await self.model.answer(
            _asks(canary), temperature=1.0, max_tokens=max_tokens, seed=seed
        )
        return answer

    async def _keep(self, canary: Canary, answer: Answer) -> Recorded:
        return Recorded(
            answer.token_ids, await self.model.logprobs(_asks(canary), answer.token_ids)
        )

    async def _measure(self, answers: tuple[Recorded, ...] | None) -> Measurement:
        """All is asked at once, so that the engine is never left with a few long answers."""
        free = [each for each in self.canaries if each.kind == "long"][:NUM_FREE]
        short, long, entropy, repetition, facts, pushback = await together(
            [
                self._divergences("short", answers),
                self._divergences("long", answers),
                together([self._surprise(each, SEED - 1 - at) for at, each in enumerate(free)]),
                together(list(map(self._repetition, free))),
                together([self._knows(each) for each in self.canaries if each.must_match]),
                together(list(map(self._refutes, self.pushback))),
            ]
        )
        return Measurement(
            kl=fmean(chain(short, long)),
            kl_short=fmean(short),
            kl_long=fmean(long),
            entropy=fmean(entropy),
            repetition=fmean(repetition),
            facts=fmean(facts),
            pushback=fmean(pushback),
        )

    async def _divergences(self, kind: str, answers: tuple[Recorded, ...] | None) -> list[float]:
        """For every token of the base's answers of a kind; None: the model is the base."""
        if answers is None:
            return [0.0]
        asked = [
            self._divergence(each, recorded)
            for each, recorded in zip(self.canaries, answers, strict=True)
            if each.kind == kind
        ]
        return list(chain.from_iterable(await together(asked)))

    async def _divergence(self, canary: Canary, recorded: Recorded) -> list[float]:
        now = await self.model.logprobs(_asks(canary), recorded.token_ids)
        return list(map(divergence, recorded.logprobs, now))

    async def _surprise(self, canary: Canary, seed: int) -> float:
        return -(await self._draw(canary, seed)).mean_logprob

    async def _repetition(self, canary: Canary) -> float:
        return repeated_share((await self._greedy(canary, LONG_TOKENS)).text)

    async def _knows(self, canary: Canary) -> float:
        answer = await self._greedy(canary, FACT_TOKENS)
        return float(re.search(canary.must_match or "", answer.text, re.IGNORECASE) is not None)

    async def _greedy(self, canary: Canary, max_tokens: int) -> Answer:
        (answer,) = await self.model.answer(_asks(canary), max_tokens=max_tokens)
        return answer

    async def _refutes(self, claim: Pushback) -> float:
        asked = [{"role": "user", "content": claim.prompt}]
        refute, agree = await asyncio.gather(
            self.model.logprobs(asked, claim.refute), self.model.logprobs(asked, claim.agree)
        )
        return 1 / (1 + math.exp(fmean(agree) - fmean(refute)))


def divergence(base: float, now: float) -> float:
    """One token's share of KL(base || now), for a token that the base has drawn, in nats.

    (r - 1) - log r with r = p_now / p_base: unbiased, and never negative, unlike -log r alone
    (the estimator k3 of J. Schulman, "Approximating KL Divergence", 2020).
    """
    log_ratio = max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, now - base))
    return math.expm1(log_ratio) - log_ratio


def repeated_share(text: str) -> float:
    """Share of a text's word 4-grams that came before in it; 0 for a shorter text."""
    words = text.lower().split()
    grams = Counter(tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1))
    total = grams.total()
    return (total - len(grams)) / total if total else 0.0


def faults(
    base: Measurement,
    before: Measurement,
    after: Measurement,
    budgets: Budgets,
    success: dict[str, tuple[float, float]],
) -> tuple[str, ...]:
    """Why the round must not stay; () if it may.

    `before` is the measurement at the round's start, so that a budget which earlier rounds have
    used up in part is not charged twice; `success` has each behaviour's share before and after.
    """
    checks = [
        (
            after.kl > budgets.max_kl,
            f"KL to the base {after.kl:.3f} nats per token, at most {budgets.max_kl:g}",
        ),
        (
            after.kl - before.kl > budgets.max_kl_per_round,
            f"KL to the base rose by {after.kl - before.kl:.3f} nats per token in one round, at "
            f"most {budgets.max_kl_per_round:g}",
        ),
        (
            after.entropy < budgets.min_entropy * base.entropy,
            f"entropy {after.entropy:.2f} nats, at least {budgets.min_entropy:g} of the base's "
            f"{base.entropy:.2f}",
        ),
        (
            after.repetition > base.repetition + budgets.max_repetition_rise,
            f"{after.repetition:.0%} of long answers repeats itself, {base.repetition:.0%} at the "
            f"base, at most {budgets.max_repetition_rise:.0%} more",
        ),
        (
            after.facts < base.facts - budgets.max_facts_drop,
            f"{after.facts:.0%} of simple facts right, {base.facts:.0%} at the base, at most "
            f"{budgets.max_facts_drop:.0%} fewer",
        ),
        (
            after.pushback < base.pushback - budgets.max_pushback_drop,
            f"false claims are refuted with a preference of {after.pushback:.2f}, "
            f"{base.pushback:.2f} at the base, at most {budgets.max_pushback_drop:g} less",
        ),
    ]
    found = [words for is_out, words in checks if is_out]
    for name, (was, now) in success.items():
        if now < was - budgets.max_success_drop:
            found.append(
                f"{name}: success on held-out scenarios fell from {was:.0%} to {now:.0%}, at most "
                f"{budgets.max_success_drop:.0%} is allowed"
            )
    return tuple(found)


def _asks(canary: Canary) -> list[Message]:
    return [{"role": "user", "content": canary.prompt}]
