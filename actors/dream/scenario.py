"""Situations in which a behaviour matters, invented by the live model from a collision of memories.

    2 or 3 memories + examples --few-shot text, temperature--> what a user might say next

The instruction is never shown to the writer, so that it cannot be in what is written. A plain text
with examples is continued, not a chat: a small base model follows examples, not orders.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from actors.dream.behaviour import Behaviour
from actors.dream.library import ScenarioExample
from actors.dream.model import LiveModel

NUM_EXAMPLES: Final = 6
NUM_SHARING: Final = 12
"""Draws in a row that see the same examples in the same order, so that these are read once."""
MAX_TOKENS: Final = 48
MIN_WORDS: Final = 3
MAX_WORDS: Final = 60
_HEAD: Final = "Notes about a person, and what this person then says to an assistant.\n\n"


@dataclass(frozen=True)
class Seed:
    """What one scenario is made from."""

    memories: tuple[str, ...]
    number: int
    """Of the draw: the same number and weights give the same scenario."""


def collide(memories: Sequence[str], number: int, rng: random.Random) -> Seed:
    """Two or three memories that have never met, in random order; fewer if there are no more."""
    num = min(len(memories), rng.choice((2, 3)))
    return Seed(tuple(rng.sample(list(memories), num)), number)


def prompt(seed: Seed, behaviour: Behaviour, examples: Sequence[ScenarioExample]) -> str:
    """The text that the model continues with the scenario."""
    rng = random.Random(seed.number // NUM_SHARING)
    shown = rng.sample(list(examples), min(NUM_EXAMPLES, len(examples)))
    told = [_notes(each.memories, each.topic) + f" {each.situation}\n\n" for each in shown]
    return _HEAD + "".join(told) + _notes(seed.memories, behaviour.topic)


def _notes(memories: Sequence[str], topic: str | None) -> str:
    about = f"About: {topic}\n" if topic else ""
    return f"Notes: {' '.join(memories)}\n{about}Says:"


async def write(
    model: LiveModel,
    seed: Seed,
    behaviour: Behaviour,
    examples: Sequence[ScenarioExample],
    temperature: float,
) -> str:
    """One scenario; it may be useless, see `fault`."""
    (written,) = await model.complete(
        prompt(seed, behaviour, examples),
        temperature=temperature,
        max_tokens=MAX_TOKENS,
        seed=seed.number,
        stop=["\n"],
    )
    return written.text if written.is_finished else ""


def fault(scenario: str) -> str | None:
    """Why a scenario is no message of a user's; None if it may be one."""
    num_words = len(scenario.split())
    if not scenario:
        return "it did not come to its end"
    if not MIN_WORDS <= num_words <= MAX_WORDS:
        return f"{num_words} words, and {MIN_WORDS} to {MAX_WORDS} are a message"
    if any(mark in scenario for mark in ("Notes:", "About:", "Says:")):
        return "it goes on with the examples"
    return None
