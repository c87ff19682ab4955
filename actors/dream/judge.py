"""Whether an answer shows a behaviour: what can be checked is checked, the rest is asked.

    checks --fail--> no
       |hold, and there is a rubric
       v
    the live model, asked twice: "A. yes B. no" and "A. no B. yes" --both say yes--> yes

A model that likes one letter better says yes once and no once, and that is a no. Knows no scores of
training; a verdict has its reasons in words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from actors.dream.behaviour import Behaviour
from actors.dream.checks import failures
from actors.dream.library import JudgeExample
from actors.dream.model import LiveModel
from actors.dream.together import together

_LETTERS: Final = (" A", " B")


@dataclass(frozen=True)
class Verdict:
    """What was found of one answer."""

    is_good: bool
    reasons: tuple[str, ...] = ()
    """Why not; empty for a good one."""
    margins: tuple[float, ...] = ()
    """Log-probability of yes over no, in nats, in each order; empty without a rubric."""


async def judge(
    model: LiveModel,
    behaviour: Behaviour,
    question: str,
    answer: str,
    examples: Sequence[JudgeExample],
) -> Verdict:
    """The verdict on one answer; the model is asked only if the checks hold."""
    failed = failures(answer, behaviour.checks) if behaviour.checks else ()
    if failed or behaviour.rubric is None:
        return Verdict(not failed, failed)
    orders = (True, False)
    margins = await together(
        [_ask(model, behaviour.rubric, question, answer, examples, order) for order in orders]
    )
    votes = [margin > 0 for margin in margins]
    if all(votes):
        return Verdict(True, (), tuple(margins))
    why = "the model finds that it does not" if not any(votes) else "the votes differ by order"
    return Verdict(False, (f"rubric: {why}",), tuple(margins))


async def _ask(
    model: LiveModel,
    rubric: str,
    question: str,
    answer: str,
    examples: Sequence[JudgeExample],
    is_yes_first: bool,
) -> float:
    shown = [
        _case(each.rubric, each.question, each.answer, is_yes_first)
        + _LETTERS[each.is_good != is_yes_first]
        + "\n\n"
        for each in examples
    ]
    prompt = "".join(shown) + _case(rubric, question, answer, is_yes_first)
    first, second = await model.prefer(prompt, _LETTERS)
    return first - second if is_yes_first else second - first


def _case(rubric: str, question: str, answer: str, is_yes_first: bool) -> str:
    first, second = ("yes", "no") if is_yes_first else ("no", "yes")
    return (
        f"Rule: {rubric}\nQuestion: {question}\nAnswer: {answer}\n"
        f"Does the answer keep the rule? A. {first} B. {second}\nChoice:"
    )
