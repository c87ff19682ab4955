"""A live model that is only asked while nobody else needs it.

A call waits until clients have been quiet for a while. When one comes, what is being computed is
given up and asked again later: an answer of a dream may be lost, a client's may not be late.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from actors.dream.model import Answer, LiveModel, Message

LOOK_INTERVAL_S: Final = 0.05

T = TypeVar("T")


class PoliteModel:
    """Wraps a model; counts the time for which it waited."""

    def __init__(self, model: LiveModel, idle_s: Callable[[], float], yield_s: float) -> None:
        """`idle_s()` says for how long no client has asked anything; 0 while one is answered."""
        self._model, self._idle_s, self._yield_s = model, idle_s, yield_s
        self._waiting = 0
        self._waits_since = 0.0
        self.waited_s = 0.0
        """In all, however many calls waited at once."""

    @property
    def num_tokens(self) -> int:
        return self._model.num_tokens

    async def answer(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 96,
        seed: int | None = None,
    ) -> list[Answer]:
        return await self._politely(
            lambda: self._model.answer(
                messages, n=n, temperature=temperature, max_tokens=max_tokens, seed=seed
            )
        )

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
        return await self._politely(
            lambda: self._model.complete(
                prompt, n=n, temperature=temperature, max_tokens=max_tokens, seed=seed, stop=stop
            )
        )

    async def logprobs(
        self, messages: Sequence[Message], answer: str | Sequence[int]
    ) -> tuple[float, ...]:
        return await self._politely(lambda: self._model.logprobs(messages, answer))

    async def prefer(self, prompt: str, options: Sequence[str]) -> tuple[float, ...]:
        return await self._politely(lambda: self._model.prefer(prompt, options))

    async def wait_idle(self) -> None:
        """Until nobody needs the machine."""
        if self._idle_s() >= self._yield_s:
            return
        if not self._waiting:
            self._waits_since = time.monotonic()
        self._waiting += 1
        try:
            while self._idle_s() < self._yield_s:
                await asyncio.sleep(LOOK_INTERVAL_S)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self.waited_s += time.monotonic() - self._waits_since

    async def _politely(self, ask: Callable[[], Awaitable[T]]) -> T:
        while True:
            await self.wait_idle()
            asking = asyncio.ensure_future(ask())
            try:
                while self._idle_s() > 0 and not asking.done():
                    await asyncio.wait([asking], timeout=LOOK_INTERVAL_S)
                if asking.done():
                    return asking.result()
            finally:
                asking.cancel()
