"""Routes of the page for people: its files, and what it is told while it is open.

    GET /ui, /ui/NAME   files of door/page/, read once, only those that are named here
    GET /events         snapshots of the cell, see `feed`
    GET /learned        what no generation holds yet

The files need no key, for nothing in them is secret; whatever they ask for does.
"""

import hashlib
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from actors.dream.report import STYLE
from actors.errors import NotFound, ReverieError, Unavailable
from door.base import Door
from door.feed import Listening
from door.views import as_json

FOLDER: Final = Path(__file__).parent / "page"
INDEX: Final = "index.html"
NAMES: Final = (
    *("page.css", "parts.css", "icon.svg"),
    *("main.js", "api.js", "live.js", "dom.js", "tabs.js", "confirm.js", "key.js"),
    *("chat.js", "teach.js", "timeline.js", "plot.js"),
    *("learned.js", "undo.js", "candidates.js", "dreams.js", "state.js"),
)
TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def _hash_of(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        # A round's report is opened from here with the page's key, and keeps its one style.
        f"style-src 'self' 'sha256-{_hash_of(STYLE)}'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Final = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}
"""Nothing from elsewhere, nothing inline; asked again each time, and answered with 304."""


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    body: bytes
    media_type: str
    etag: str


def _read(name: str) -> PageFile:
    body = (FOLDER / name).read_bytes()
    digest = hashlib.sha256(body).hexdigest()[:32]
    return PageFile(body, TYPES[Path(name).suffix], f'"{digest}"')


FILES: Final = {name: _read(name) for name in (INDEX, *NAMES)}

router = APIRouter()


class PageRoutes(Door):
    """The page, and what only the page asks for."""

    @router.get("/ui", include_in_schema=False)
    async def ui(self, request: Request) -> Response:
        return _answer(FILES[INDEX], request)

    @router.get("/ui/{name}", include_in_schema=False)
    async def ui_file(self, name: str, request: Request) -> Response:
        if name not in NAMES:
            raise NotFound(f"there is no {request.url.path} here; the page is /ui")
        return _answer(FILES[name], request)

    @router.get("/events")
    async def feed(self, request: Request) -> Response:
        """The cell as server-sent events: `you` and `steps` once, `status` at every change."""
        self._allow(request, "use")
        if self._report is not None and self._report.state == "stopping":
            raise Unavailable("the cell is stopping")

        def may_go_on() -> bool:
            try:
                self._allow(request, "use")
            except ReverieError:
                return False
            return True

        limit_s = self._settings.limits.request_timeout_s
        you = {"may_teach": self._may_teach(request), "has_keys": bool(self._keys.records())}
        self._feed.listeners.take()
        return Listening(self._feed.listen(you, may_go_on, limit_s), self._feed.listeners)

    @router.get("/learned")
    async def learned(self, request: Request) -> JSONResponse:
        """What the live weights have learned since the newest generation, as GET /checkpoints/N."""
        self._allow(request, "teach")
        report = self._ready()
        assert report.checkpoint is not None and self._versions is not None
        since, version = report.checkpoint.weights_version, self._versions.weights_version
        found = await self._ask("trainer", "learned", version, since)
        return JSONResponse({"since": since, "weights_version": version} | as_json(found))


def _answer(file: PageFile, request: Request) -> Response:
    headers = HEADERS | {"etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
