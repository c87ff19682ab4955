"""What every route stands on: the boot of the cell that is alive, its actors, keys and limits.

    /status, /readyz, /events <-- the cell's last report, looked at regularly: nobody asks for it

Knows HTTP; which routes there are is the business of those that build on it.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from starlette.requests import Request
from starlette.responses import Response

from actors import logs
from actors.calls import within
from actors.cell import connect
from actors.dream.exchange import Exchange
from actors.ending import NAMESPACE
from actors.errors import NotPermitted, OnTrial, ReverieError, Unavailable
from actors.messages import CellPaths, CellReport, CellState
from actors.posted import CheckpointRequest, ForgetRequest
from actors.settings import Settings
from actors.traffic import Traffic
from actors.versions import VersionCounter
from door.access import ids_of
from door.audit import NO_KEY, Audit
from door.exchanges import ExchangeLog
from door.feed import Feed
from door.guard import KEY, LEAVING
from door.keys import KeyStore, Scope, require_loopback
from door.latencies import Latencies
from door.limits import Slots, parse, read_body, require_json
from door.metrics import Metrics
from door.proxy import EngineProxy
from door.quotas import Meter
from door.ray_metrics import RayMetrics
from door.views import status_as_json

POLL_INTERVAL_S: Final = 0.5
POLL_TIMEOUT_S: Final = 5
TRIAL_INTERVAL_S: Final = 1.0
"""Between two looks whether a dream is still on trial."""
MAX_WAITING: Final = 8
"""Requests that wait for it, out of all that may be inside."""

Acting = AbstractAsyncContextManager[dict[str, Any]]
T = TypeVar("T")


def request_id(request: Request) -> str:
    """The id that Serve gave the request, or took from the client, and also sends as a header."""
    return ids_of(request.headers)[0]


def body_of(model: Any) -> dict[str, Any]:
    """OpenAPI's description of a body that we parse ourselves, to word its errors ourselves."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema | {"$defs": definitions})
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": json.loads(text)}},
        }
    }


class Door:
    """Keys, limits and the way to the actors."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        logs.configure(settings.logs, "ingress", self._live_version)
        self._keys = KeyStore(settings.home)
        self._slots = Slots(settings.limits.max_ongoing_requests)
        self._log = ExchangeLog(settings.dream.log_conversations, self._deliver)
        self._feed = Feed()
        self._cell = connect(settings)
        self._report: CellReport | None = None
        self._paths: CellPaths | None = None
        """Of the engine that `_engine` asks; unlike those of any other."""
        self._engine: EngineProxy | None = None
        self._versions: VersionCounter | None = None
        self._traffic: Traffic | None = None
        self._following = asyncio.get_running_loop().create_task(self._follow())

    # What the cell is doing: looked at regularly, so that no request has to ask.

    async def _follow(self) -> None:
        through_ray = RayMetrics(self._settings.cell.ray_metrics_s)
        while True:
            try:
                self._report = await within(self._cell.report.remote(), POLL_TIMEOUT_S)
                await self._adopt_boot(self._report)
            except Exception:  # Whatever it was: a state that is not known is not ready.
                self._report = None
            self._feed.tell(self._snapshot())
            await through_ray.tell(self._metrics())
            await asyncio.sleep(POLL_INTERVAL_S)

    def _metrics(self) -> Metrics:
        now = (self._report, self._versions, self._slots.taken, self._latencies)
        return Metrics(self._settings, *now)

    def _live_version(self) -> int | None:
        return None if self._versions is None else self._versions.weights_version

    def _snapshot(self) -> dict[str, Any]:
        return status_as_json(self._report, self._versions, self._slots.taken, self._log)

    async def _adopt_boot(self, report: CellReport | None) -> None:
        if report is None or report.state != "ready" or report.paths == self._paths:
            return
        assert report.paths is not None
        if self._engine is not None:
            await self._engine.close()
        self._versions = VersionCounter(report.paths.versions)
        self._traffic = Traffic(report.paths.traffic, is_writable=True)
        timeout_s = self._settings.limits.request_timeout_s
        watched = (self._versions, self._traffic, self._latencies)
        self._engine = EngineProxy(report.paths.socket, timeout_s, *watched)
        self._paths = report.paths

    def _ready(self) -> CellReport:
        """The report of a cell that answers and learns; else raises Unavailable with the reason."""
        return self._in_state(("ready",))

    def _answering(self) -> CellReport:
        """The same of a cell whose engine answers, though what is around it may be starting."""
        report = self._in_state(("ready", "recovering"))
        return report if report.engine is not None else self._ready()

    def _in_state(self, states: tuple[CellState, ...]) -> CellReport:
        report = self._report
        if report is None:
            raise Unavailable("the cell does not answer; it restarts by itself, try again")
        if report.state not in states or report.paths != self._paths:
            stage = next((s.name for s in reversed(report.stages) if not s.is_done), report.state)
            raise Unavailable(f"the cell is {report.state} ({report.reason or stage}); try again")
        return report

    async def _ask(
        self, role: str, method: str, *arguments: Any, timeout_s: float | None = None
    ) -> Any:
        """One call of an actor; its ReverieErrors are raised here, its death is Unavailable."""
        self._ready()
        limit = timeout_s or self._settings.limits.control_timeout_s
        try:
            actor = ray.get_actor(role, NAMESPACE)
            return await within(getattr(actor, method).remote(*arguments), limit)
        except RayTaskError as error:
            if isinstance(error.cause, ReverieError):
                raise error.cause from None
            raise
        except (RayError, ValueError):
            raise Unavailable(f"the {role} went away; it restarts by itself, try again") from None
        except TimeoutError:
            raise Unavailable(f"the {role} did not answer within {limit:g} s; try again") from None

    async def _ask_after_trial(
        self, request: Request, method: str, posted: CheckpointRequest | ForgetRequest
    ) -> Any:
        """As `_ask` of the checkpoint; again, for `wait_s` of it, once no dream is on trial.

        Waits here: the actor's turn is needed to take a dream back that the gate refuses.
        """
        limit, now = self._settings.cell.checkpoint_timeout_s, asyncio.get_running_loop().time
        until = now() + posted.wait_s
        while True:
            try:
                return await self._ask("checkpoint", method, posted, timeout_s=limit)
            except OnTrial:
                if now() >= until:
                    raise
            with self._waiting.one():
                await asyncio.sleep(min(TRIAL_INTERVAL_S, until - now()))
                while self._is_on_trial() and now() < until:
                    self._ready()  # A stop, or a restart, ends the wait.
                    await asyncio.sleep(min(TRIAL_INTERVAL_S, until - now()))
            self._allow(request, "teach")  # A key may have been taken away meanwhile.

    def _is_on_trial(self) -> bool:
        """By the cell's last report."""
        trainer = self._report.trainer if self._report else None
        return trainer is not None and trainer.on_trial is not None

    @cached_property
    def _waiting(self) -> Slots:
        return Slots(MAX_WAITING, "requests wait for a dream's gate")

    @cached_property
    def _latencies(self) -> Latencies:
        return Latencies()

    @cached_property
    def _meter(self) -> Meter:
        return Meter(self._settings.home)

    @cached_property
    def _audit(self) -> Audit:
        return Audit()

    def _allow(self, request: Request, scope: Scope) -> None:
        record = self._keys.find(request.headers.get("authorization"), scope)
        if record is None:
            require_loopback(request)
        elif KEY not in request.scope:  # A stream asks again whether it may go on.
            leave = self._meter.enter(record)
            request.scope.setdefault(LEAVING, []).append(leave)
        request.scope[KEY] = record

    def _act(self, request: Request, act: str, **asked: Any) -> Acting:
        """What notes an act of somebody who was let in; to be done within it."""
        report = self._ready()
        assert report.paths is not None
        record = request.scope[KEY]
        who = {
            "request": request_id(request),
            "key": NO_KEY if record is None else str(record["id"]),
            "route": f"{request.method} {request.scope['route'].path}",
        }
        return self._audit.act(Path(report.paths.ledger).parent, who, act, **asked)

    def _may_teach(self, request: Request) -> bool:
        try:
            self._keys.check(request.headers.get("authorization"), "teach")
        except NotPermitted:
            return False
        return True

    async def _deliver(self, exchanges: tuple[Exchange, ...]) -> int:
        return int(await self._ask("dream", "hear", exchanges))

    async def _pass(self, request: Request) -> Response:
        self._allow(request, "use")
        self._slots.take()
        leave = self._slots.give
        is_passed = False
        try:
            body = await self._read(request)
            hearing = self._log.hear(request, body, self._may_teach)
            self._answering()
            assert self._engine is not None and self._traffic is not None
            leave = self._enter(self._traffic)
            tally = self._meter.tally(request.scope[KEY], body)
            response = await self._engine.forward(request, body, leave, hearing, tally)
            is_passed = True
            return response
        finally:
            if not is_passed:
                leave()

    def _enter(self, traffic: Traffic) -> Callable[[], None]:
        """Count a request as inside; returns what its end calls, whatever boot it is by then."""
        traffic.enter()

        def leave() -> None:
            traffic.leave()
            self._slots.give()

        return leave

    async def _body(self, request: Request, model: type[T]) -> T:
        return parse(model, await self._raw(request))  # type: ignore[type-var]

    async def _raw(self, request: Request) -> bytes:
        """The JSON that somebody who may teach has posted, not read yet."""
        self._allow(request, "teach")
        require_json(request)
        return await self._read(request)

    async def _read(self, request: Request) -> bytes:
        limits = self._settings.limits
        return await read_body(request, limits.max_body_bytes, limits.body_timeout_s)
