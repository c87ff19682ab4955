"""What the cell is doing, as server-sent events, for everybody who listens.

    Door._follow --tell--> Feed: the newest snapshot, the newest steps --> listener, listener, ...

No listener costs an actor anything: each is told what the door finds out anyway. Knows no keys;
whether somebody may go on listening is asked of whoever let them in.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from door.limits import Slots

MAX_LISTENERS: Final = 32
"""Of one replica, those of single jobs included; each is a request that Serve counts, too."""
MAX_STEPS: Final = 600
"""Newest steps that a listener is told of when it begins."""
HEARTBEAT_S: Final = 15.0
"""Longest silence: a connection that is gone is found out, and so is a key that is."""
HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Feed:
    """The newest snapshot and those who wait for the next one."""

    def __init__(self) -> None:
        self.listeners = Slots(MAX_LISTENERS, "listeners are there")
        self._snapshot: dict[str, Any] = {"state": "starting"}
        self._number = 0
        self._changed = asyncio.Event()
        self._steps: deque[dict[str, Any]] = deque(maxlen=MAX_STEPS)
        self._last_step: tuple[str, int] | None = None

    def tell(self, snapshot: dict[str, Any]) -> None:
        """Wake all listeners, if anything is other than it was."""
        if snapshot == self._snapshot:
            return
        self._snapshot = snapshot
        self._note_step(snapshot.get("trainer"))
        self._number += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def _note_step(self, trainer: dict[str, Any] | None) -> None:
        if trainer is None or trainer["job_id"] is None or trainer["last_loss"] is None:
            return
        step = trainer["job_id"], trainer["steps"]
        if step == self._last_step or not trainer["steps"]:
            return
        self._last_step = step
        self._steps.append(
            {
                "version": trainer["weights_version"],
                "loss": trainer["last_loss"],
                "changed": trainer["last_changed"],
            }
        )

    async def listen(
        self, you: dict[str, Any], may_go_on: Callable[[], bool], limit_s: float
    ) -> AsyncIterator[str]:
        """Events: who is listening, the steps and the state now, then what changes.

        Until the limit, the end of the cell, or of what the listener may.
        """
        clock = asyncio.get_running_loop()
        ends, told = clock.time() + limit_s, -1
        yield _event("you", you)
        yield _event("steps", list(self._steps))
        while may_go_on():
            if told != self._number:
                told = self._number
                yield _event("status", self._snapshot)
                if self._snapshot["state"] == "stopping":
                    return  # Serve waits for whoever is still inside.
                continue  # It may have changed while that was sent.
            left = ends - clock.time()
            if left <= 0:
                return
            try:
                async with asyncio.timeout(min(left, HEARTBEAT_S)):
                    await self._changed.wait()
            except TimeoutError:
                yield ": alive\n\n"


class Listening(StreamingResponse):
    """The stream of one listener, who has been let in; the place is given back at its end."""

    def __init__(self, events: AsyncIterator[str], listeners: Slots) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self._listeners = listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._listeners.give()


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
