"""A request as the application is handed one, without a server."""

import asyncio
from typing import Any

from starlette.requests import Request


def request_of(
    *parts: bytes, method: str = "POST", path: str = "/train", query: str = "", **headers: str
) -> Request:
    """A request whose body arrives in the given parts; reading further waits for ever."""
    left = [
        {"type": "http.request", "body": part, "more_body": at < len(parts) - 1}
        for at, part in enumerate(parts)
    ]

    async def receive() -> Any:
        return left.pop(0) if left else await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }
    return Request(scope, receive)
