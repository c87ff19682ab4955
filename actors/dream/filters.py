"""What is not learned although the judge would take it: each filter says why, or None.

A reason is `kind` or `kind: detail`, so that a round can count them by kind.

Knows texts and numbers, no model.
"""

import re
from collections.abc import Iterable
from typing import Final

from actors.dream.gate import repeated_share

MAX_SHARED: Final = 0.6
"""Share of word pairs that two texts may have in common before they count as one."""
MAX_REPEATED: Final = 0.25
"""Share of 4-grams of an answer that may come twice."""
LEAK_WORDS: Final = 5
"""So many words in the order of the instruction are the instruction."""
OF_ANSWERING: Final = frozenset(
    ("answer", "answers", "instruction", "instructions", "question", "questions", "reply")
    + ("respond", "response", "sentence", "sentences", "user", "word", "words")
)
"""An answer with such a word of the instruction speaks of answering, and does not answer."""


def near_duplicate(text: str, others: Iterable[str]) -> str | None:
    """The first of `others` that says the same in nearly the same words."""
    pairs = _grams(text, 2)
    for other in others:
        known = _grams(other, 2)
        if _words(text) == _words(other) or (
            pairs and len(pairs & known) / len(pairs | known) > MAX_SHARED
        ):
            return f"nearly the same as another: {other!r}"
    return None


def leak(text: str, instruction: str, asked: str = "") -> str | None:
    """A text that repeats or discusses the instruction, unless `asked` does, not follows it."""
    shared = _grams(text, LEAK_WORDS) & _grams(instruction, LEAK_WORDS)
    if shared:
        return f"repeats the instruction: {' '.join(min(shared))!r}"
    said = OF_ANSWERING & {*_words(text)} & {*_words(instruction)} - {*_words(asked)}
    if said:
        return f"speaks of its instruction: {min(said)!r}"
    return None


def repetition(text: str) -> str | None:
    """An answer that goes round in circles."""
    share = repeated_share(text)
    if share > MAX_REPEATED:
        return f"repeats itself: {share:.0%} comes twice, at most {MAX_REPEATED:.0%}"
    return None


def divergence(shown: float, hidden: float, low: float, high: float) -> str | None:
    """An answer that the instruction makes too little likelier, or too much."""
    value = shown - hidden
    if value < low:
        return f"nothing left to learn: divergence {value:.2f} nats per token, at least {low:g}"
    if value > high:
        return f"too far away: divergence {value:.2f} nats per token, at most {high:g}"
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _grams(text: str, num: int) -> set[tuple[str, ...]]:
    words = _words(text)
    return {tuple(words[at : at + num]) for at in range(len(words) - num + 1)}
