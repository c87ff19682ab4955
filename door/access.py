"""A line in the log for each request, and its ids in every line that is logged within.

    client --> AccessLog: request, trace --> Guard --> routes

What is asked for is told by its route, not its path: ids and queries are whoever's words.
"""

import logging
import time
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.logs import bound, trace_of
from actors.posted import MAX_ID_CHARS
from door.guard import KEY

log = logging.getLogger(__name__)

REQUEST_ID: Final = "x-request-id"
TRACEPARENT: Final = "traceparent"


def ids_of(headers: Headers) -> tuple[str, str]:
    """The id that Serve gave the request, or took from the client, and what traces it."""
    request = headers.get(REQUEST_ID, "")[:MAX_ID_CHARS]
    return request, trace_of(headers.get(TRACEPARENT), request)


class AccessLog:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; its line comes when the answer has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, answered = time.monotonic(), Answered()

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.take(message)
            await send(message)

        request, trace = ids_of(Headers(scope=scope))
        with bound(request=request, trace=trace):
            try:
                await self._app(scope, receive, send_noted)
            except Exception:
                answered.break_off()
                raise
            finally:
                level = answered.level(scope)
                log.log(level, "request", extra=answered.facts(scope, begun))


class Answered:
    """What came of a request."""

    def __init__(self) -> None:
        self._status: int | None = None
        self._version: str | None = None

    def take(self, message: Message) -> None:
        """The beginning of its answer."""
        self._status = message["status"]
        self._version = Headers(raw=message["headers"]).get("x-weights-version")

    def break_off(self) -> None:
        """Nothing that a route has foreseen."""
        self._status = 500

    def level(self, scope: Scope) -> int:
        """Low for those who only look, often, and whoever shows no key: anybody can be refused."""
        if self._status == 500:
            return logging.WARNING
        is_done = KEY in scope and self._status is not None and self._status < 400
        is_look = scope["method"] in ("GET", "HEAD")
        return logging.INFO if is_done and not is_look else logging.DEBUG

    def facts(self, scope: Scope, begun: float) -> dict[str, Any]:
        """Of the route, what was answered, and to whom."""
        key, route = scope.get(KEY), scope.get("route")
        facts = {
            "method": scope["method"],
            "route": getattr(route, "path", None),
            "status": self._status,
            "seconds": round(time.monotonic() - begun, 4),
            "key": None if key is None else key["id"],
        }
        return facts if self._version is None else facts | {"version": int(self._version)}
