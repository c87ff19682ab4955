"""Waiting at a stop until nobody is being answered any more, for as long as that may take.

The door answers 503 to new requests meanwhile, once it has noticed; what it lets in until then is
waited for, too.
"""

import asyncio
import time
from typing import Final

from actors.traffic import Traffic

INTERVAL_S: Final = 0.1
DRAINED_S: Final = 1.5
"""Nobody inside for so long: the door has noticed the stop by then, and lets nobody in any more."""


async def drain(path: str, timeout_s: float) -> None:
    """Wait until nobody has been inside for a while, by the page of traffic at `path`."""
    try:
        traffic, begun = Traffic(path), time.monotonic()
    except (OSError, ValueError):
        return  # Somebody has removed the boot's directory: nobody can be answered in it.
    while (waited_s := time.monotonic() - begun) < timeout_s:
        if min(traffic.idle_s(), waited_s) >= DRAINED_S:
            return
        await asyncio.sleep(INTERVAL_S)
