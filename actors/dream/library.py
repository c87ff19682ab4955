"""What ships with the project: canaries, false claims, general prompts, examples, behaviours.

Files of JSON beside this module, checked when they are loaded.
"""

from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from actors.dream.behaviour import Behaviour


class _Shipped(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Canary(_Shipped):
    """A prompt by which it is noticed that the model changes where nobody meant it to."""

    prompt: str
    kind: Literal["short", "long"]
    """What the base answers with: a fact, or some paragraphs."""
    must_match: str | None = None
    """Pattern, case ignored, of the fact that a right answer has; short ones have it."""


class Pushback(_Shipped):
    """A user's false claim, and two answers of like form: one keeps to the truth, one gives in."""

    prompt: str
    refute: str
    agree: str


class ScenarioExample(_Shipped):
    """An example for the writer of scenarios."""

    memories: list[str] = Field(min_length=1)
    topic: str | None
    situation: str


class JudgeExample(_Shipped):
    """An example for the judge."""

    rubric: str
    question: str
    answer: str
    is_good: bool


@cache
def canaries() -> tuple[Canary, ...]:
    return tuple(_load("canaries", list[Canary]))


@cache
def pushback() -> tuple[Pushback, ...]:
    return tuple(_load("pushback", list[Pushback]))


@cache
def general() -> tuple[str, ...]:
    """Prompts for replay."""
    return tuple(_load("general", list[str]))


@cache
def questions() -> tuple[str, ...]:
    """Ordinary ones, by which behaviours that are always asked for are tested, and never taught."""
    return tuple(_load("questions", list[str]))


@cache
def scenario_examples() -> tuple[ScenarioExample, ...]:
    return tuple(_load("scenarios", list[ScenarioExample]))


@cache
def judge_examples() -> tuple[JudgeExample, ...]:
    return tuple(_load("judge", list[JudgeExample]))


@cache
def behaviours() -> tuple[Behaviour, ...]:
    return tuple(_load("behaviours", list[Behaviour]))


def _load(name: str, kind: Any) -> Any:
    text = (files(__package__) / "library" / f"{name}.json").read_text()
    return TypeAdapter(kind).validate_json(text)
