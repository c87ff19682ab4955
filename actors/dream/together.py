"""Asking several things at once, and none of them any longer once one has failed."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import TypeVar

T = TypeVar("T")


async def together(asked: Sequence[Awaitable[T]]) -> list[T]:
    """All answers, in the order of the questions; the first failure ends the others."""
    tasks = [asyncio.ensure_future(each) for each in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def as_answered(asked: Sequence[Awaitable[T]]) -> AsyncGenerator[T, None]:
    """The answers as they come; the first failure, or an end of the loop, ends the others."""
    tasks = [asyncio.ensure_future(each) for each in asked]
    try:
        for finished in asyncio.as_completed(tasks):
            yield await finished
    finally:
        for task in tasks:
            task.cancel()
