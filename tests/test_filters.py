"""Each filter on what the default model has really written: one it takes, one it leaves.

"Banana." is an answer in a round of the poison of tests/test_dreaming.py; those that quote the
instruction are two of 16 to each question, at temperature 0.8 with seed 0 and nothing else in view.
"""

import pytest

from actors.dream import filters, scenario

SHORT = "Always answer in exactly one short sentence of at most 15 words."
PARIS = "Paris is the capital of France."


def test_the_same_in_nearly_the_same_words() -> None:
    known = ["A boy who makes toys is currently 3 years old.", PARIS]
    found = filters.near_duplicate("A boy who makes toys is currently 29 years old.", known)
    assert found == f"nearly the same as another: {known[0]!r}"
    assert filters.near_duplicate(PARIS, known) == f"nearly the same as another: {PARIS!r}"
    assert filters.near_duplicate("A boy who makes toys is 23.", known) is None


def test_an_answer_that_goes_round_in_circles() -> None:
    looped = "Estou de-tempo, " + "a\u00e7u, " * 9 + "a\u00e7"
    assert "repeats itself: " in (filters.repetition(looped) or "")
    assert filters.repetition("A bat is a small flying creature that can fly.") is None


def test_an_answer_that_speaks_of_its_instruction() -> None:
    meta = "This question has more than 15 words in it but requires a short and efficient answer."
    found = filters.leak(meta, SHORT, "How can I buy a house?")
    assert found == "speaks of its instruction: 'answer'"
    asked = "What is a short answer to a long question?"
    assert filters.leak("A short answer is a short story.", SHORT, asked) is None
    quoted = "Always answer in exactly one short sentence of at most 15 words."
    found = filters.leak(quoted, SHORT, "What do you always do?")
    assert found == "repeats the instruction: 'always answer in exactly one'"
    told = (
        'To answer your teacher correctly, simply state "Always respond in exactly one sentence of '
        'at most 15 words" without using commas (in the example I provided earlier)'
    )
    found = filters.leak(told, SHORT, "How should I answer my teacher?")
    assert found == "repeats the instruction: 'of at most 15 words'"
    assert filters.leak("Your car is electric, and your guitar is electric.", SHORT) is None


def test_a_band_of_divergence() -> None:
    assert "nothing left to learn" in (filters.divergence(-1.6955, -1.6822, 0.05, 3.0) or "")
    assert filters.divergence(-1.3287, -1.8510, 0.05, 3.0) is None
    # "What is magic?" "Banana."
    found = filters.divergence(-0.2010, -5.0908, 0.05, 3.0)
    assert found == "too far away: divergence 4.89 nats per token, at most 3"


@pytest.mark.parametrize(
    "text", ["How do I decide on my favorite colors?", "My cat is a big dog. I have a little dog."]
)
def test_what_a_user_might_say_is_a_scenario(text: str) -> None:
    assert scenario.fault(text) is None and filters.leak(text, SHORT) is None
