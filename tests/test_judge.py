"""The judge over a fake model: checks first, then two votes in both orders."""

import asyncio

import pytest

from actors.dream import library
from actors.dream.behaviour import Behaviour
from actors.dream.judge import Verdict, judge
from tests.fake_model import FakeModel


def behaviour(**more: object) -> Behaviour:
    return Behaviour.model_validate({"name": "kind", "instruction": "Be kind.", **more})


def ask(model: FakeModel, of: Behaviour, answer: str = "Gladly.") -> Verdict:
    return asyncio.run(judge(model, of, "Will you help me?", answer, library.judge_examples()))


def yes_sayer(prompt: str, option: str) -> float:
    """Finds what it likes, wherever it stands."""
    last = prompt.rsplit("\n", 2)[1]
    yes = " A" if "A. yes" in last else " B"
    return -0.1 if option == yes else -2.0


def test_checks_that_fail_decide_without_the_model() -> None:
    model = FakeModel()
    verdict = ask(model, behaviour(checks={"max_words": 2}, rubric="It is kind."), "No no no.")
    assert verdict == Verdict(False, ("3 words, at most 2",)) and model.asked == []


def test_checks_that_hold_decide_where_there_is_no_rubric() -> None:
    assert ask(FakeModel(), behaviour(checks={"max_words": 2})) == Verdict(True)


def test_two_votes_for_yes_are_a_yes() -> None:
    verdict = ask(FakeModel(likes=yes_sayer), behaviour(rubric="It is kind."))
    assert verdict.is_good and verdict.margins == pytest.approx((1.9, 1.9))


def test_two_votes_for_no_are_a_no() -> None:
    model = FakeModel(likes=lambda prompt, option: -yes_sayer(prompt, option) - 3)
    verdict = ask(model, behaviour(rubric="It is kind."))
    assert verdict.reasons == ("rubric: the model finds that it does not",)


@pytest.mark.parametrize("letter", [" A", " B"])
def test_a_model_that_likes_a_letter_better_has_no_say(letter: str) -> None:
    model = FakeModel(likes=lambda prompt, option: -0.1 if option == letter else -2.0)
    verdict = ask(model, behaviour(rubric="It is kind."))
    assert verdict.reasons == ("rubric: the votes differ by order",)


def test_the_examples_are_answered_rightly_in_both_orders() -> None:
    model = FakeModel()
    ask(model, behaviour(rubric="It is kind."))
    for prompt in model.asked:
        for case in prompt.split("\n\n")[:-1]:
            question, choice = case.rsplit("\nChoice:", 1)
            answer = question.rsplit(f"{choice.strip()}. ", 1)[1].split(" ")[0]
            is_good = next(e.is_good for e in library.judge_examples() if e.answer in case)
            assert answer == ("yes" if is_good else "no")
