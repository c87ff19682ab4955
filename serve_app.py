"""The door: a Ray Serve ingress that turns HTTP into messages and errors into status codes.

    client --> Serve's HTTP proxy --> Ingress --bytes over a Unix socket--> vLLM's application
                                             --records over actor calls--> trainer, checkpoint, cell

Run it with `reverie up`, or with `serve run serve_app:build_app model=...`. Knows no tensors.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from ray import serve
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from actors.errors import InvalidRequest, MalformedRequest, NotFound, ReverieError, Unavailable
from actors.messages import JobView
from actors.posted import (
    MAX_ID_CHARS,
    CheckpointRequest,
    ForgetRequest,
    RollbackRequest,
    TrainRequest,
)
from actors.settings import Settings
from door.access import AccessLog, ids_of
from door.audit import listed
from door.base import body_of, request_id
from door.candidate_routes import CandidateRoutes
from door.candidate_routes import router as candidate_router
from door.docs_page import page as docs_page
from door.dream_routes import DreamRoutes
from door.dream_routes import router as dream_router
from door.feed import Listening
from door.guard import KEY, Guard
from door.page_routes import PageRoutes
from door.page_routes import router as page_router
from door.views import as_json, generation_as_json, job_as_json

EVENT_INTERVAL_S: Final = 0.25
MAX_JOBS_LISTED: Final = 100
TERMINAL: Final = ("done", "failed", "cancelled")
V1_PATH: Final = re.compile(r"(\w[\w.:-]*)(/\w[\w.:-]*)*", re.ASCII)
"""No empty, hidden or still quoted part, so that what is allowed is what vLLM's socket is asked."""

app = FastAPI(
    title="Reverie",
    version="0.1.0",
    description=(__doc__ or "").split("\n")[0],
    docs_url=None,  # Those fetch scripts from elsewhere; /docs is ours.
    redoc_url=None,
)
app.include_router(dream_router)
app.include_router(candidate_router)
app.include_router(page_router)


def error_response(error: ReverieError, request: Request) -> JSONResponse:
    """An error in OpenAI's shape; `Retry-After` where trying again helps."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = {
        "type": error.kind,
        "message": str(error),
        "param": error.param,
        "request_id": request_id(request),
    }
    return JSONResponse({"error": body}, error.status, headers)


app.add_middleware(Guard, refuse=error_response)
app.add_middleware(AccessLog)  # The last is the outermost.


@app.exception_handler(ReverieError)
async def _on_reverie_error(request: Request, error: ReverieError) -> JSONResponse:
    return error_response(error, request)


@app.exception_handler(HTTPException)
async def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    path = request.url.path
    if error.status_code == 404:
        return error_response(NotFound(f"there is no {path} here; see /docs"), request)
    headers = dict(error.headers or {})
    reason = f"{request.method} {path}: {error.detail}; see /docs"
    if error.status_code == 405:
        headers = {"allow": _methods_of(request) or headers.get("allow", "")}
        reason = f"{path} takes {headers['allow']}, not {request.method}; see /docs"
    response = error_response(MalformedRequest(reason), request)
    response.status_code = error.status_code
    response.headers.update(headers)
    return response


def _methods_of(request: Request) -> str:
    """What all routes of the path take; empty if one takes this, and only vLLM does not."""
    matches = [(route.matches(request.scope)[0], route) for route in request.app.routes]
    if any(match is Match.FULL for match, _ in matches):
        return ""
    methods = {m for match, route in matches if match is Match.PARTIAL for m in route.methods}
    return ", ".join(sorted(methods))


@app.exception_handler(Exception)
async def _on_unknown_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(ReverieError("something went wrong inside; the log has it"), request)


@serve.deployment(
    name="ingress",
    # The door refuses long before, and in its own words; beyond both, Serve itself answers 503.
    max_ongoing_requests=512,
    max_queued_requests=128,
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=5,
)
@serve.ingress(app)
class Ingress(DreamRoutes, CandidateRoutes, PageRoutes):
    """All routes, over whatever boot of the cell is alive."""

    # vLLM's routes.

    @app.api_route("/v1/{path:path}", methods=["GET", "POST"], include_in_schema=False)
    async def v1(self, path: str, request: Request) -> Response:
        if not V1_PATH.fullmatch(path):
            raise NotFound(f"there is no {request.url.path} here; see /docs")
        return await self._pass(request)

    @app.post("/v1/chat/completions", summary="Chat, as in OpenAI's API (vLLM's own route)")
    async def chat(self, request: Request) -> Response:
        return await self._pass(request)

    @app.post("/tokenize", summary="Token ids of a text or of messages (vLLM's own route)")
    async def tokenize(self, request: Request) -> Response:
        return await self._pass(request)

    @app.post("/detokenize", summary="Text of token ids (vLLM's own route)")
    async def detokenize(self, request: Request) -> Response:
        return await self._pass(request)

    # Teaching.

    @app.post("/train", status_code=202, openapi_extra=body_of(TrainRequest))
    async def train(self, request: Request) -> JSONResponse:
        """Queue samples to be learned; they are durable when this answers."""
        with self._slots.one():
            posted = await self._body(request, TrainRequest)
            limit = self._settings.limits.max_samples
            if len(posted.samples) > limit:
                raise InvalidRequest(
                    f"samples: {len(posted.samples)} at once, the limit is {limit}; post more jobs"
                ).about("samples")
            num, ids = len(posted.samples), [each.id for each in posted.samples if each.id]
            with self._meter.samples(request.scope[KEY], num):
                async with self._act(request, "train", samples=num, ids=listed(ids)) as noted:
                    trace = ids_of(request.headers)[1]
                    made = await self._ask("trainer", "submit", posted, None, trace)
                    noted.update(status=202, job_id=made.job_id, duplicates=len(made.duplicates))
            return JSONResponse(as_json(made), 202)

    @app.get("/train/jobs")
    async def jobs(self, request: Request) -> JSONResponse:
        """The newest jobs first."""
        self._allow(request, "teach")
        views = await self._ask("trainer", "jobs", MAX_JOBS_LISTED)
        return JSONResponse({"data": [job_as_json(view) for view in views]})

    @app.get("/train/jobs/{job_id}")
    async def job(self, job_id: str, request: Request) -> JSONResponse:
        """One job: state, losses, versions, error."""
        self._allow(request, "teach")
        return JSONResponse(job_as_json(await self._ask("trainer", "job", job_id)))

    @app.delete("/train/jobs/{job_id}")
    async def cancel(self, job_id: str, request: Request) -> JSONResponse:
        """Cancel a job that is queued or training."""
        self._allow(request, "teach")
        async with self._act(request, "cancel", id=job_id[:MAX_ID_CHARS]) as noted:
            view = await self._ask("trainer", "cancel", job_id)
            noted["status"] = 200
        return JSONResponse(job_as_json(view))

    @app.get("/train/jobs/{job_id}/events")
    async def events(self, job_id: str, request: Request) -> Response:
        """The job as server-sent events: one per change, until it ends."""
        self._allow(request, "teach")
        first = await self._ask("trainer", "job", job_id)
        self._feed.listeners.take()
        return Listening(self._events(first), self._feed.listeners)

    async def _events(self, view: JobView) -> AsyncIterator[str]:
        deadline = asyncio.get_running_loop().time() + self._settings.limits.request_timeout_s
        shown = None
        while True:
            state = (view.status, view.steps)
            if state != shown:
                shown = state
                yield f"event: job\ndata: {json.dumps(job_as_json(view))}\n\n"
            if view.status in TERMINAL or asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(EVENT_INTERVAL_S)
            try:
                view = await self._ask("trainer", "job", view.job_id)
            except Unavailable as error:
                yield f"event: error\ndata: {json.dumps({'message': str(error)})}\n\n"
                return

    @app.post("/checkpoint", openapi_extra=body_of(CheckpointRequest))
    async def checkpoint(self, request: Request) -> JSONResponse:
        """Keep the weights as they are now; durable, and public if asked, when this answers.

        While a dream is on trial it waits, up to `wait_s`, until the gate has judged it.
        """
        with self._slots.one():
            posted = await self._body(request, CheckpointRequest)
            async with self._act(request, "checkpoint", publish=posted.publish) as noted:
                made = await self._ask_after_trial(request, "commit", posted)
                noted.update(status=200, generation=made.generation)
            return JSONResponse(as_json(made))

    @app.get("/checkpoints")
    async def checkpoints(self, request: Request) -> JSONResponse:
        """The generations that can be returned to, newest first."""
        self._allow(request, "teach")
        views = await self._ask("checkpoint", "history")
        return JSONResponse({"data": [as_json(view) for view in views]})

    @app.get("/checkpoints/{generation}")
    async def generation(self, generation: str, request: Request) -> JSONResponse:
        """What was learned in one generation: its items, without their texts, losses and drift."""
        self._allow(request, "teach")
        if not re.fullmatch(r"[0-9]{1,18}", generation):  # int() refuses thousands of digits.
            raise NotFound("a generation is a number; see GET /checkpoints").about("generation")
        limit = self._settings.cell.checkpoint_timeout_s
        detail = await self._ask("checkpoint", "show", int(generation), timeout_s=limit)
        return JSONResponse(generation_as_json(detail))

    @app.post("/checkpoints/verify")
    async def verify(self, request: Request) -> JSONResponse:
        """Read all that is kept and compare every hash."""
        with self._slots.one():
            self._allow(request, "teach")
            limit = self._settings.cell.checkpoint_timeout_s
            return JSONResponse(as_json(await self._ask("checkpoint", "verify", timeout_s=limit)))

    @app.post("/rollback", openapi_extra=body_of(RollbackRequest))
    async def rollback(self, request: Request) -> JSONResponse:
        """Make the weights of an earlier generation live again, as a new generation."""
        with self._slots.one():
            posted = await self._body(request, RollbackRequest)
            limit = self._settings.cell.checkpoint_timeout_s
            async with self._act(request, "rollback", returns_to=posted.generation) as noted:
                made = await self._ask("checkpoint", "roll_back", posted, timeout_s=limit)
                noted.update(status=200, generation=made.generation)
            return JSONResponse(as_json(made))

    @app.post("/forget", openapi_extra=body_of(ForgetRequest))
    async def forget(self, request: Request) -> JSONResponse:
        """Undo what was learned of one sample, and never learn it again; all others stay.

        While a dream is on trial it waits, up to `wait_s`, until the gate has judged it.
        """
        with self._slots.one():
            posted = await self._body(request, ForgetRequest)
            async with self._act(request, "forget", id=posted.item) as noted:
                done = await self._ask_after_trial(request, "forget", posted)
                noted.update(status=200, generation=done.generation)
            return JSONResponse(as_json(done))

    # Looking in.

    @app.get("/docs", include_in_schema=False)
    async def docs(self, request: Request) -> Response:
        """All routes and their bodies, as one page."""
        return docs_page(request.app.openapi())

    @app.get("/healthz")
    async def healthz(self) -> PlainTextResponse:
        """Whether the door itself answers."""
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def readyz(self) -> JSONResponse:
        """200 when the model answers and learns; until then 503 with the reason and the stages."""
        stages = as_json(self._report)["stages"] if self._report else []
        try:
            self._ready()
        except Unavailable as error:
            body = {"status": "unavailable", "reason": str(error), "stages": stages}
            return JSONResponse(body, 503, {"retry-after": str(Unavailable.retry_after_s)})
        return JSONResponse({"status": "ready", "reason": None, "stages": stages})

    @app.get("/status")
    async def status(self, request: Request) -> JSONResponse:
        """Versions, actors, queue and memory."""
        self._allow(request, "use")
        return JSONResponse(self._snapshot())

    @app.get("/metrics")
    async def metrics(self, request: Request) -> PlainTextResponse:
        """Prometheus text: Reverie's own metrics, then vLLM's."""
        self._allow(request, "use")
        text = self._metrics().text()
        if self._engine is not None:
            with contextlib.suppress(Unavailable):
                self._answering()
                text += (await self._engine.fetch("/metrics")).decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def build_app(arguments: dict[str, Any]) -> serve.Application:
    """The Serve application of one cell; `arguments` are settings as `group.key: value`.

    Raises SettingsError for an unknown key or a bad value. Without keys, requests that come in over
    a public address are refused one by one: this function is not told where Serve listens.
    """
    settings = Settings.from_pairs(arguments)
    return Ingress.bind(settings)  # type: ignore[attr-defined,no-any-return]
