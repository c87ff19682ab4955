"""A behaviour: what shall be learned, and how an answer that shows it is told from others.

Knows no model. The client who posts it is told exactly what is wrong with it.
"""

from collections.abc import Sequence
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from actors.dream.checks import Checks

MAX_INSTRUCTION_CHARS: Final = 2_000
MAX_EXAMPLES: Final = 16
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9_-]{0,63}$"
"""A name is part of routes and file names."""


class Example(BaseModel):
    """A turn that shows the behaviour."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: str = Field(min_length=1, max_length=MAX_INSTRUCTION_CHARS)
    assistant: str = Field(min_length=1, max_length=MAX_INSTRUCTION_CHARS)


class Behaviour(BaseModel):
    """An instruction that is to move into the weights. Body of `PUT /behaviours/{name}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME_PATTERN)
    """Lower-case letters, digits, hyphens and underscores."""
    instruction: str = Field(min_length=1, max_length=MAX_INSTRUCTION_CHARS)
    """What a system prompt would say; in view when answers are written, gone when learned."""
    examples: list[Example] = Field(default=[], max_length=MAX_EXAMPLES)
    """Turns that are in view with the instruction: a small model follows examples, not orders."""
    uses_memories: bool = False
    """Whether the memories that a situation was made from are in view with the instruction."""
    topic: str | None = Field(default=None, min_length=1, max_length=100)
    """What a message must be about for the behaviour to matter, in a few words; None: anything."""
    checks: Checks | None = None
    """What every answer that shows the behaviour looks like."""
    rubric: str | None = Field(default=None, min_length=1, max_length=MAX_INSTRUCTION_CHARS)
    """What a judge reads: the sentence that is true of a good answer."""
    tier: Literal[1, 2, 3] = 1
    """1 is always asked for, 2 has a clear trigger, 3 a subtle one."""
    target: float = Field(default=0.9, gt=0, le=1)
    """Success on held-out scenarios at which the behaviour rests."""
    max_tokens: int = Field(default=96, ge=1, le=4096)
    """Longest answer."""

    def in_view(self, memories: Sequence[str]) -> list[dict[str, str]]:
        """The messages that are there when an answer is written, and gone when it is learned."""
        told = [self.instruction, *(memories if self.uses_memories else ())]
        messages = [{"role": "system", "content": "\n".join(told)}]
        for example in self.examples:
            messages.append({"role": "user", "content": example.user})
            messages.append({"role": "assistant", "content": example.assistant})
        return messages

    @field_validator("instruction", "rubric")
    @classmethod
    def _check_words(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("it is blank; say what shall be done")
        return text

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rubric is None and (self.checks is None or self.checks.is_empty):
            raise ValueError(
                "give `checks` that ask for something, or a `rubric`: else every answer passes"
            )
        if self.tier > 1 and self.topic is None:
            raise ValueError(
                f"tier={self.tier} has a trigger: name it as `topic`, or make it tier 1"
            )
        num_words = None if self.checks is None else self.checks.min_words
        if num_words is not None and num_words > self.max_tokens:
            raise ValueError(
                f"checks.min_words={num_words} is above max_tokens={self.max_tokens}; raise that"
            )
        return self
