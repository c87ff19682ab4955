"""The outermost layer: what no request may have, and what every answer has, whatever the route.

    client --> Guard: sizes, other origins --> routes --> Guard: headers --> client

Web pages of other origins get nothing: no Access-Control header is ever sent, a preflight is
refused, and so is what a browser says comes from another site. Knows no keys and no settings.
"""

import re
from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.errors import MalformedRequest, NotPermitted, ReverieError

MAX_TARGET_BYTES: Final = 4096
"""Path and query: the longest id, quoted, is a tenth of it."""
MAX_HEADERS: Final = 100
MAX_HEADER_BYTES: Final = 32 * 1024
"""Of all headers together, names and values; a browser's are about 1 KiB."""
KEY: Final = "reverie.key"
"""In the scope: the record of the key that was let in, None for nobody's."""
LEAVING: Final = "reverie.leaving"
"""In the scope: what is called when the answer has ended, however it did."""

_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255})(:[0-9]{1,5})?")
_ADDED: Final = {
    "cache-control": "no-store",  # What is said here, and by whom, is nobody's to keep.
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
}
"""Unless a route says otherwise, as those that answer with a page do."""

Refuse = Callable[[ReverieError, Request], Response]


class Guard:
    """ASGI middleware; `refuse` words an error as all routes do."""

    def __init__(self, app: ASGIApp, refuse: Refuse) -> None:
        self._app, self._refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; what was put into `LEAVING` is called at its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        leaving: list[Callable[[], None]] = scope.setdefault(LEAVING, [])

        async def send_closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                _close(MutableHeaders(scope=message))
            await send(message)

        try:
            try:
                check(scope)
            except ReverieError as error:
                answer = self._refuse(error, Request(scope))
                await answer(scope, receive, send_closed)
                return
            await self._app(scope, receive, send_closed)
        finally:
            for leave in leaving:
                leave()


def check(scope: Scope) -> None:
    """Raises MalformedRequest or NotPermitted for what no route wants to see."""
    target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    if target > MAX_TARGET_BYTES:
        raise MalformedRequest(
            f"path and query are {target} bytes, the limit is {MAX_TARGET_BYTES}; send a body"
        )
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise MalformedRequest(
            f"{len(headers)} headers of {size} bytes; the limits are {MAX_HEADERS} and "
            f"{MAX_HEADER_BYTES}"
        )
    given = Headers(scope=scope)
    host = given.get("host", "")
    if "host" in given and not _HOST.fullmatch(host):
        raise MalformedRequest("the Host header is not a name or an address with a port")
    _check_origin(scope["method"], given, host)


def _check_origin(method: str, given: Headers, host: str) -> None:
    """A browser says which site asks. A link to here, which shows a page, may be anywhere."""
    site, origin = given.get("sec-fetch-site"), given.get("origin")
    is_link = method == "GET" and given.get("sec-fetch-mode") == "navigate"
    if site is not None:
        is_foreign = site not in ("same-origin", "none") and not is_link
    else:
        is_foreign = origin is not None and origin.partition("://")[2] != host
    if is_foreign or "access-control-request-method" in given:
        raise NotPermitted(
            "a web page of another origin asks for this, and none may: ask from a program, or "
            "from a page that this server gives"
        )


def _close(headers: MutableHeaders) -> None:
    for name in [name for name in headers if name.startswith("access-control-")]:
        del headers[name]
    for name, value in _ADDED.items():
        headers.setdefault(name, value)
