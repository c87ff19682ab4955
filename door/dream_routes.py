"""Routes of the dream loop: behaviours, memories, rounds, scores."""

import json
from dataclasses import asdict
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.responses import Response

from actors.dream.behaviour import Behaviour
from actors.dream.curriculum import Progress
from actors.dream.records import Item
from actors.dream.report import page
from actors.errors import InvalidRequest
from actors.posted import MAX_ID_CHARS, DreamRequest, MemoriesRequest, ScoreRequest
from door.audit import listed
from door.base import Door, body_of
from door.limits import parse, parse_json

MAX_LISTED: Final = 100
PAGE_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""The page runs nothing and fetches nothing, whatever a model has written into it."""

router = APIRouter()


class DreamRoutes(Door):
    """What the dream actor is asked over HTTP."""

    @router.get("/behaviours")
    async def behaviours(self, request: Request) -> JSONResponse:
        """All of them, with how far each has been learned."""
        self._allow(request, "teach")
        found = await self._ask("dream", "behaviours")
        return JSONResponse({"data": [_behaviour_as_json(*each) for each in found]})

    @router.get("/behaviours/{name}")
    async def behaviour(self, name: str, request: Request) -> JSONResponse:
        """One behaviour."""
        self._allow(request, "teach")
        return JSONResponse(_behaviour_as_json(*await self._ask("dream", "behaviour", name)))

    @router.put("/behaviours/{name}", openapi_extra=body_of(Behaviour))
    async def put_behaviour(self, name: str, request: Request) -> JSONResponse:
        """Add a behaviour, or replace it: it is then learned from the start."""
        with self._slots.one():
            posted = parse_json(await self._raw(request))
            if posted.setdefault("name", name) != name:
                raise InvalidRequest(
                    f"name: {posted['name']!r} in the body and {name!r} in the path; leave one out"
                ).about("name")
            behaviour = parse(Behaviour, json.dumps(posted).encode())
            async with self._act(request, "put behaviour", id=name) as noted:
                made = await self._ask("dream", "put_behaviour", behaviour)
                noted["status"] = 200
            return JSONResponse(_behaviour_as_json(*made))

    @router.delete("/behaviours/{name}", status_code=204)
    async def delete_behaviour(self, name: str, request: Request) -> Response:
        """Forget a behaviour; what was learned of it stays learned."""
        self._allow(request, "teach")
        async with self._act(request, "delete behaviour", id=name[:MAX_ID_CHARS]) as noted:
            await self._ask("dream", "delete_behaviour", name)
            noted["status"] = 204
        return Response(status_code=204)

    @router.get("/memories")
    async def memories(self, request: Request) -> JSONResponse:
        """The newest memories first."""
        self._allow(request, "teach")
        found = await self._ask("dream", "memories", MAX_LISTED)
        return JSONResponse({"data": [asdict(each) for each in found]})

    @router.post("/memories", status_code=201, openapi_extra=body_of(MemoriesRequest))
    async def add_memories(self, request: Request) -> JSONResponse:
        """Keep texts that scenarios may be made from; durable when this answers."""
        with self._slots.one():
            posted = await self._body(request, MemoriesRequest)
            ids = [each.id for each in posted.memories if each.id is not None]
            asked = {"memories": len(posted.memories), "ids": listed(ids)}
            async with self._act(request, "add memories", **asked) as noted:
                made = await self._ask("dream", "add_memories", posted)
                noted.update(status=201, ids=listed([each.id for each in made]))
            return JSONResponse({"data": [asdict(each) for each in made]}, 201)

    @router.delete("/memories/{memory_id}", status_code=204)
    async def delete_memory(self, memory_id: str, request: Request) -> Response:
        """Forget a memory; no further scenario is made from it."""
        self._allow(request, "teach")
        async with self._act(request, "delete memory", id=memory_id[:MAX_ID_CHARS]) as noted:
            await self._ask("dream", "delete_memory", memory_id)
            noted["status"] = 204
        return Response(status_code=204)

    @router.post("/dream", status_code=202, openapi_extra=body_of(DreamRequest))
    async def dream(self, request: Request) -> JSONResponse:
        """Dream so many rounds, as soon as nobody needs the machine; queued when this answers."""
        with self._slots.one():
            posted = await self._body(request, DreamRequest)
            asked = {"rounds": posted.rounds, "behaviour": (posted.behaviour or "")[:MAX_ID_CHARS]}
            async with self._act(request, "dream", **asked) as noted:
                made = await self._ask("dream", "dream", posted)
                noted["status"] = 202
            return JSONResponse(asdict(made), 202)

    @router.delete("/dream")
    async def stop_dreaming(self, request: Request) -> JSONResponse:
        """Forget the rounds that were asked for, and take back the one that runs."""
        self._allow(request, "teach")
        async with self._act(request, "stop dreaming") as noted:
            made = await self._ask("dream", "stop_dreaming")
            noted["status"] = 200
        return JSONResponse(asdict(made))

    @router.get("/dream/rounds")
    async def rounds(self, request: Request) -> JSONResponse:
        """The newest rounds first."""
        self._allow(request, "teach")
        found = await self._ask("dream", "rounds", MAX_LISTED)
        return JSONResponse({"data": [each.as_json() for each in found]})

    @router.get("/dream/rounds/{round_id}")
    async def round(self, round_id: str, request: Request) -> JSONResponse:
        """One round: every item that was kept or dropped, and why; losses; what the gate saw."""
        self._allow(request, "teach")
        found, items = await self._ask("dream", "round", round_id)
        return JSONResponse(found.as_json() | {"items": [_item_as_json(item) for item in items]})

    @router.get("/dream/rounds/{round_id}/report")
    async def report(self, round_id: str, request: Request) -> HTMLResponse:
        """The same as one page for people."""
        self._allow(request, "teach")
        found, items = await self._ask("dream", "round", round_id)
        return HTMLResponse(page(found, items), headers=PAGE_HEADERS)

    @router.post("/score", openapi_extra=body_of(ScoreRequest))
    async def score(self, request: Request) -> JSONResponse:
        """How much likelier an answer is with its instruction in view, in nats per token."""
        with self._slots.one():
            posted = await self._body(request, ScoreRequest)
            return JSONResponse(await self._ask("dream", "score", posted))


def _behaviour_as_json(behaviour: Behaviour, progress: Progress) -> dict[str, Any]:
    shown = behaviour.model_dump(exclude_defaults=True) | {"name": behaviour.name}
    return shown | {"progress": asdict(progress)}


def _item_as_json(item: Item) -> dict[str, Any]:
    return asdict(item) | {"divergence": item.divergence}
