"""A live model for fast tests: it answers by rule, and holds any answer as likely as it is told."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.dream.model import Answer, LiveModel, Message

LIKELY, UNLIKELY = -0.5, -1.5


def answer(text: str, *, is_finished: bool = True, mean_logprob: float = LIKELY) -> Answer:
    return Answer(text, tuple(range(len(text.split()))), is_finished, mean_logprob)


@dataclass
class FakeModel:
    """`says(messages, at)` is the answer number `at`; `writes(prompt)` continues a text."""

    says: Callable[[Sequence[Message], int], str] = lambda messages, at: "It is so."
    writes: Callable[[str, int | None], str] = lambda prompt, seed: f"What is number {seed}?"
    holds: Callable[[Sequence[Message], str], float] = lambda messages, text: LIKELY
    """Log-probability of each token of an answer."""
    likes: Callable[[str, str], float] = lambda prompt, option: LIKELY
    asked: list[str] = field(default_factory=list)
    is_endless: bool = False
    """Whether a continued text never comes to its end."""
    delay_s: float = 0.0
    num_tokens: int = 0

    async def answer(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 96,
        seed: int | None = None,
    ) -> list[Answer]:
        await self._take(messages[-1]["content"])
        return [answer(self.says(messages, at)) for at in range(n)]

    async def complete(
        self,
        prompt: str,
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 96,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        await self._take(prompt)
        text = self.writes(prompt, seed)
        return [answer(text, is_finished=not self.is_endless) for _ in range(n)]

    async def logprobs(
        self, messages: Sequence[Message], answer: str | Sequence[int]
    ) -> tuple[float, ...]:
        text = answer if isinstance(answer, str) else ""
        await self._take(text)
        num = len(answer.split()) + 1 if isinstance(answer, str) else len(answer)
        return (self.holds(messages, text),) * num

    async def prefer(self, prompt: str, options: Sequence[str]) -> tuple[float, ...]:
        await self._take(prompt)
        return tuple(self.likes(prompt, option) for option in options)

    async def _take(self, what: str) -> None:
        self.asked.append(what)
        self.num_tokens += 10
        await asyncio.sleep(self.delay_s)


def check_protocol(model: FakeModel) -> LiveModel:
    """Mypy holds the fake to the protocol of the real one here."""
    return model
