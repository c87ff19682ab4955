"""Which behaviour is dreamt of next, and how freely: what fails most is drawn most.

    failure rate --weight--> drawn     at its target: rests, is tested again later
                 --temperature--> how freely scenarios and answers are sampled

Knows rates and numbers of rounds; what a round does is not its business.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Standing = Literal["learning", "resting", "stopped"]
"""`resting`: at its target. `stopped`: the gate refused it twice; it waits for a person."""

MIN_WEIGHT: Final = 0.05
"""So that a behaviour that hardly fails is still drawn at times."""
COOLEST: Final = 0.5
HOTTEST: Final = 0.8
MEMORY: Final = 0.5
"""Share of the newest test in the failure rate; the rest is what was known."""
RETEST_ROUNDS: Final = 4
"""Rounds after which a resting behaviour is tested again."""
RETEST_S: Final = 24 * 3600
"""Time without a round after which one is dreamt of a resting behaviour, if none learns."""
SLACK: Final = 0.05
"""How far below its target a resting behaviour may be found before it learns again."""


@dataclass(frozen=True)
class Progress:
    """How one behaviour stands."""

    name: str
    target: float
    standing: Standing = "learning"
    failure_rate: float = 1.0
    tested_round: int = 0


def draw(
    all_of_them: Sequence[Progress], rng: random.Random, *, may_retest: bool = False
) -> Progress | None:
    """One that learns, by its weight; else None, or the resting one tested longest ago."""
    learning = [each for each in all_of_them if each.standing == "learning"]
    if not learning:
        resting = [each for each in all_of_them if each.standing == "resting" and may_retest]
        return min(resting, key=lambda each: each.tested_round, default=None)
    weights = [max(MIN_WEIGHT, each.failure_rate) for each in learning]
    return rng.choices(learning, weights)[0]


def temperature(failure_rate: float) -> float:
    """Of sampling: freer where the behaviour fails, for there the usual answers are not it."""
    assert 0 <= failure_rate <= 1, f"{failure_rate} is no rate"
    return COOLEST + (HOTTEST - COOLEST) * failure_rate


def due(all_of_them: Sequence[Progress], round_number: int) -> list[Progress]:
    """Resting ones that shall be tested again."""
    return [
        each
        for each in all_of_them
        if each.standing == "resting" and round_number - each.tested_round >= RETEST_ROUNDS
    ]


def after_test(before: Progress, success: float, round_number: int) -> Progress:
    """The progress after a test on scenarios that were never trained on."""
    assert 0 <= success <= 1, f"{success} is no share"
    failure_rate = (1 - MEMORY) * before.failure_rate + MEMORY * (1 - success)
    standing = before.standing
    if standing == "learning" and success >= before.target:
        standing = "resting"
    elif standing == "resting" and success < before.target - SLACK:
        standing = "learning"
    return Progress(before.name, before.target, standing, failure_rate, round_number)
