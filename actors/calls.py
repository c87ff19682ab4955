"""Waiting for an actor's answer: never without a limit, and its failure in one line of words."""

import asyncio
from typing import Any

from actors.errors import ReverieError


async def within(call: Any, timeout_s: float) -> Any:
    """The result of a remote call, or TimeoutError: no call is without a limit."""

    async def result() -> Any:
        return await call

    try:
        return await asyncio.wait_for(result(), timeout_s)
    except TimeoutError:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None


def in_words(error: BaseException) -> str:
    """The cause of a failure in one line, without Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    is_ours = isinstance(cause, ReverieError) or type(cause).__module__.startswith("apollo.")
    if is_ours and lines:
        return lines[0]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
