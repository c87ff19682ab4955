"""Routes of what was said: conversations that were logged, and the candidates among them."""

from dataclasses import asdict
from typing import Final, get_args

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from actors.dream.logged import CandidateState
from actors.errors import InvalidRequest
from actors.posted import MAX_ID_CHARS, DecisionRequest
from door.base import Door, body_of
from door.guard import KEY

MAX_LISTED: Final = 100
STATES: Final = get_args(CandidateState)

router = APIRouter()


class CandidateRoutes(Door):
    """What was logged, and what becomes of it; all of it needs a key that may teach."""

    @router.get("/conversations")
    async def conversations(self, request: Request) -> JSONResponse:
        """Those that changed last come first; without their text."""
        self._allow(request, "teach")
        found = await self._ask("dream", "conversations", MAX_LISTED)
        return JSONResponse({"data": [asdict(each) for each in found]})

    @router.get("/conversations/{conversation_id}")
    async def conversation(self, conversation_id: str, request: Request) -> JSONResponse:
        """Its exchanges, with their scores."""
        self._allow(request, "teach")
        found = await self._ask("dream", "conversation", conversation_id)
        return JSONResponse({"id": conversation_id, "exchanges": [asdict(each) for each in found]})

    @router.delete("/conversations/{conversation_id}")
    async def delete_conversation(self, conversation_id: str, request: Request) -> JSONResponse:
        """Delete its text and its candidates; names the generations that learned from it."""
        self._allow(request, "teach")
        asked = conversation_id[:MAX_ID_CHARS]
        async with self._act(request, "delete conversation", id=asked) as made:
            done = await self._ask("dream", "delete_conversation", conversation_id)
            made["status"] = 200
        return JSONResponse(asdict(done))

    @router.get("/candidates")
    async def candidates(self, request: Request, state: str | None = None) -> JSONResponse:
        """The newest first, both answers side by side; of one `state`, if it is named."""
        self._allow(request, "teach")
        if state is not None and state not in STATES:
            raise InvalidRequest(f"state: {state[:40]!r}; it is one of {', '.join(STATES)}").about(
                "state"
            )
        found = await self._ask("dream", "candidates", MAX_LISTED, state)
        return JSONResponse({"data": [asdict(each) for each in found]})

    @router.get("/candidates/{candidate_id}")
    async def candidate(self, candidate_id: str, request: Request) -> JSONResponse:
        """One candidate."""
        self._allow(request, "teach")
        return JSONResponse(asdict(await self._ask("dream", "candidate", candidate_id)))

    @router.post("/candidates/{candidate_id}", openapi_extra=body_of(DecisionRequest))
    async def decide(self, candidate_id: str, request: Request) -> JSONResponse:
        """Approve a candidate, which is then learned once, or reject it."""
        with self._slots.one():
            posted = await self._body(request, DecisionRequest)
            asked = {"id": candidate_id[:MAX_ID_CHARS], "decision": posted.decision}
            num = int(posted.decision == "approve")
            with self._meter.samples(request.scope[KEY], num):
                async with self._act(request, "decide candidate", **asked) as noted:
                    made = await self._ask("dream", "decide", candidate_id, posted)
                    noted.update(status=200, job_id=made.job_id)
            return JSONResponse(asdict(made))
