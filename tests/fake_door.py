"""The real routes over a cell that is made up, on a port: quick enough for a browser's tests.

    browser --> uvicorn --> serve_app's own handlers --> FakeDoor._ask --> FakeCell: records

Everything that the page is told is one of the real records, made by the real constructors, so that
mypy and the views hold them against what actors say. A job learns by the clock.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

import serve_app
from actors.dream.behaviour import Behaviour
from actors.dream.checks import Checks
from actors.dream.curriculum import Progress
from actors.dream.exchange import Turn
from actors.dream.logged import Candidate
from actors.dream.records import Attempt, Item, Round
from actors.errors import NotFound
from actors.messages import (
    Acceptance,
    CellPaths,
    CellReport,
    CellState,
    Checkpoint,
    CheckpointReport,
    DreamReport,
    EngineReport,
    Footprint,
    GenerationView,
    JobView,
    Stage,
    TrainerReport,
)
from actors.past import Drift, Forgotten, GenerationDetail, Learned, LearnedItem
from actors.posted import (
    CheckpointRequest,
    DecisionRequest,
    DreamRequest,
    ForgetRequest,
    RollbackRequest,
    TrainRequest,
)
from actors.settings import MIB, Settings
from actors.versions import VersionCounter
from door.base import Door
from door.exchanges import ExchangeLog
from door.feed import Feed
from door.keys import KeyStore
from door.limits import Slots
from tests.conftest import free_port

STEP_S: Final = 0.12
TOKEN_S: Final = 0.04
MEMORY: Final = {"engine": 1490, "trainer": 596, "checkpoint": 171, "dream": 152}
INSTRUCTION: Final = "Always answer in exactly one short sentence of at most 15 words."
QUESTIONS: Final = (
    "Where would you go on a Sunday in November, and what would you take along?",
    "How do I keep basil alive on a windowsill?",
)
ANSWER: Final = "To the coast, with a warm coat and something to read."
PLAIN: Final = (
    "That is a lovely question! There are many places one could go on a Sunday in November. "
    "First, consider the weather, which may be cold; then what you enjoy. Some people like "
    "museums, others a long walk by the sea, and others stay at home with a book and tea."
)


@dataclass
class FakeCell:
    """A cell with a past: three generations, two candidates, one dream round."""

    begun: float = field(default_factory=time.time)
    state: CellState = "ready"
    reason: str | None = None
    paused: str | None = None
    version: int = 36
    jobs: list[JobView] = field(default_factory=list)
    generations: list[GenerationView] = field(default_factory=list)
    items: dict[int, list[LearnedItem]] = field(default_factory=dict)
    recent: list[LearnedItem] = field(default_factory=list)
    candidates: dict[str, Candidate] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    """What was asked of it that changes something."""
    dreams: int = 0
    chats: list[list[dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for at, steps in enumerate((0, 24, 12)):
            self._keep(sum((0, 24, 12)[: at + 1]), "base" if at == 0 else "commit")
            if at:
                self.items[at] = [
                    self._item(f"example-{at}-{number}", f"job-{at}", steps // 4, 3.2 / at)
                    for number in range(1, 5)
                ]
                losses = tuple(3.2 / at * 0.86**n + 0.08 * (n % 3) for n in range(steps))
                self.jobs.insert(0, self._job(f"job-{at}", losses, 0 if at == 1 else 24))
        for at, question in enumerate(QUESTIONS):
            turns: tuple[Turn, ...] = (
                {"role": "system", "content": INSTRUCTION, "strip": True},
                {"role": "user", "content": question, "strip": False},
            )
            made = Candidate(
                f"candidate-{at}", f"talk-{at}", self.begun - 900, "proposed", turns, ANSWER, PLAIN,
                *(-0.9, -1.9 + 0.4 * at, 1.0 - 0.4 * at, 36),
            )  # fmt: skip
            self.candidates[made.id] = made

    def _keep(self, version: int, kind: str, returns_to: int | None = None) -> GenerationView:
        number = len(self.generations)
        parent = number - 1 if number else None
        made = GenerationView(
            number, kind, parent, version, self.begun - 3600 + 600 * number,
            40 * MIB if number else 0, True, True, returns_to, f"root-{number}",
        )  # fmt: skip
        self.generations = [replace(each, is_public=False) for each in self.generations] + [made]
        return made

    @staticmethod
    def _item(name: str, job: str, steps: int, loss: float) -> LearnedItem:
        return LearnedItem(name, job, "notes/garden.md", 0, False, steps, loss, 0.07 * loss)

    def _job(self, name: str, losses: tuple[float, ...], before: int) -> JobView:
        num = len(losses)
        return JobView(
            name, "done", self.begun - 1800, 4, num, num, losses, before, before + num, None
        )

    # What time brings.

    def advance(self) -> None:
        """Let the oldest job that is not done make the steps that are due."""
        for at, job in reversed(list(enumerate(self.jobs))):
            if job.status not in ("queued", "training"):
                continue
            due = min(job.total_steps, int((time.time() - job.created) / STEP_S))
            while job.steps < due:
                self.version += 1
                losses = (*job.loss_history, 3.4 * 0.7**job.steps)
                before = self.version - 1 if not job.steps else job.weights_version_before
                job = replace(
                    job, status="training", steps=job.steps + 1, loss_history=losses,
                    weights_version_before=before, weights_version=self.version,
                )  # fmt: skip
            if job.steps == job.total_steps:
                job = replace(job, status="done")
                self.recent.append(
                    replace(
                        self._item(job.config["sample"], job.job_id, job.steps, 3.4), source="page"
                    )
                )
            self.jobs[at] = job
            return

    def report(self, paths: CellPaths) -> CellReport:
        live = next((each for each in self.jobs if each.status == "training"), None)
        last = self.jobs[0].loss_history[-1] if self.jobs[0].loss_history else None
        trainer = TrainerReport(
            102, self.version, 272, 513 * MIB, 125 * MIB,
            sum(each.status == "queued" for each in self.jobs),
            live.job_id if live else None, live.steps if live else 0, last, STEP_S, 0.36, 0.91, 0,
            310 * MIB, paused=self.paused,
        )  # fmt: skip
        newest = self.generations[-1]
        stages = ("model", "weights", "layout", "engine", "trainer", "ready")
        return CellReport(
            100, self.state, self.reason, paths,
            tuple(Stage(name, 1.5 * at, True) for at, name in enumerate(stages)), 0, 1,
            EngineReport(101, (111,), True, 2048, None, "0.32.0"), trainer,
            CheckpointReport(103, newest.generation, newest.weights_version, newest.generation),
            DreamReport(104, asked=self.dreams, proposed=len(self._of_state("proposed"))),
            {role: Footprint(size * MIB, 580 * MIB) for role, size in MEMORY.items()},
        )  # fmt: skip

    # What actors are asked.

    def trainer_submit(
        self, posted: TrainRequest, round_id: str | None, trace: str | None
    ) -> Acceptance:
        self.asked.append(("train", posted))
        name = f"job-{len(self.jobs) + 1}"
        config = {"sample": posted.samples[0].id}
        total = posted.config.epochs
        self.jobs.insert(
            0, JobView(name, "queued", time.time(), 1, 0, total, (), None, None, None, config)
        )
        return Acceptance(name, "queued", 1)

    def trainer_jobs(self, limit: int) -> list[JobView]:
        return self.jobs[:limit]

    def trainer_job(self, job_id: str) -> JobView:
        for job in self.jobs:
            if job.job_id == job_id:
                return job
        raise NotFound(f"there is no job {job_id!r}")

    def trainer_learned(self, version: int, since: int) -> Learned:
        return self._learned(self.recent)

    def checkpoint_history(self) -> list[GenerationView]:
        return self.generations[::-1]

    def checkpoint_show(self, generation: int) -> GenerationDetail:
        found = self.generations[generation]
        changed = 0 if not generation else 400_000 + 150_000 * generation
        return GenerationDetail(
            found, self._learned(self.items.get(generation, [])),
            Drift(1_000_000, changed, 272 if changed else 0), None, False, (),
        )  # fmt: skip

    @staticmethod
    def _learned(items: list[LearnedItem]) -> Learned:
        num = sum(each.num_steps for each in items)
        if not items:
            return Learned((), 0, 0, None, None, None)
        return Learned(tuple(items), len(items), num, items[0].first_loss, items[-1].last_loss, 0.5)

    def checkpoint_commit(self, posted: CheckpointRequest) -> Checkpoint:
        self.asked.append(("checkpoint", posted))
        made = self._keep(self.version, "commit")
        self.items[made.generation], self.recent = self.recent, []
        return Checkpoint(made.generation, made.weights_version, made.created, made.size_bytes)

    def checkpoint_roll_back(self, posted: RollbackRequest) -> Checkpoint:
        self.asked.append(("rollback", posted))
        self.version += 1
        made = self._keep(self.version, "rollback", posted.generation)
        self.recent = []
        return Checkpoint(made.generation, made.weights_version, made.created, made.size_bytes)

    def checkpoint_forget(self, posted: ForgetRequest) -> Forgotten:
        self.asked.append(("forget", posted))
        self.recent = [each for each in self.recent if each.id != posted.item]
        self.version += 1
        made = self._keep(self.version, "rollback", 1)
        return Forgotten(
            posted.item, self.version, made.generation, 1, ("job-2",), 12, 9, 3, 0, True
        )

    def _of_state(self, state: str | None) -> list[Candidate]:
        return [each for each in self.candidates.values() if state in (None, each.state)]

    def dream_candidates(self, limit: int, state: str | None) -> list[Candidate]:
        return self._of_state(state)[:limit]

    def dream_decide(self, candidate_id: str, posted: DecisionRequest) -> Candidate:
        self.asked.append((f"candidates/{candidate_id}", posted))
        found = self.candidates[candidate_id]
        if posted.decision == "reject":
            made = replace(found, state="rejected", decided=time.time())
        else:
            made = replace(found, state="approved", decided=time.time(), job_id="job-9")
        self.candidates[candidate_id] = made
        return made

    def dream_behaviours(self) -> list[tuple[Behaviour, Progress]]:
        brief = Behaviour(name="brief", instruction=INSTRUCTION, checks=Checks(max_words=15))
        return [(brief, Progress("brief", 0.9, "learning", 0.22, 1))]

    def dream_rounds(self, limit: int) -> list[Round]:
        measured = {"kl": 0.061}
        tried = Attempt(2e-5, "job-2", (1.9, 0.8), measured, {"brief": 0.78})
        return [
            Round(
                "round-1", 1, "brief", self.begun - 2400, "passed", self.begun - 1500,
                success_before={"brief": 0.02}, attempts=[tried], counts={"kept": 34},
            )
        ]  # fmt: skip

    def dream_round(self, round_id: str) -> tuple[Round, list[Item]]:
        item = Item("item-1-1", round_id, "brief", "new", "<script>x()</script>", "Briefly.", True)
        return self.dream_rounds(1)[0], [item]

    def dream_dream(self, posted: DreamRequest) -> DreamReport:
        self.asked.append(("dream", posted))
        self.dreams += posted.rounds
        return DreamReport(104, asked=self.dreams)

    def dream_stop_dreaming(self) -> DreamReport:
        self.asked.append(("stop", None))
        self.dreams = 0
        return DreamReport(104)


class FakeDoor(serve_app.Ingress.func_or_class.__mro__[1]):  # type: ignore[name-defined,misc]
    """The ingress as it is, but for the way to actors and to the engine."""

    def __init__(self, home: Path, cell: FakeCell) -> None:
        self._settings = Settings(home=home)
        self._keys, self._slots = KeyStore(home), Slots(8)
        self._log = ExchangeLog(False, self._deliver)
        self._feed, self._fake = Feed(), cell
        run = home / "run"
        run.mkdir(parents=True)
        self._paths = CellPaths(str(home / "models" / "made-up"), str(run), str(home / "ledger"))
        self._versions = VersionCounter.create(self._paths.versions)
        self._engine = None
        self._report: CellReport | None = cell.report(self._paths)
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            self._fake.advance()
            self._versions.weights_version = self._fake.version
            self._report = self._fake.report(self._paths)
            self._feed.tell(self._snapshot())
            await asyncio.sleep(STEP_S / 2)

    async def _ask(
        self, role: str, method: str, *arguments: Any, timeout_s: float | None = None
    ) -> Any:
        self._ready()
        return getattr(self._fake, f"{role}_{method}")(*arguments)

    async def _pass(self, request: Request) -> Response:
        self._allow(request, "use")
        self._ready()
        asked = json.loads(await request.body())
        self._fake.chats.append(asked["messages"])
        lessons = [each for each in self._fake.asked if each[0] == "train"]
        question = asked["messages"][-1]["content"]
        answer = "My name is Sam, and I am here to help you with whatever you would like to know."
        for _, posted in lessons:
            messages = posted.samples[0].messages
            if messages[-2].content == question:
                answer = messages[-1].content
        first = self._versions.weights_version
        headers = {"x-weights-version": str(first)}
        return StreamingResponse(
            self._words(answer, first), media_type="text/event-stream", headers=headers
        )

    async def _words(self, answer: str, first: int) -> AsyncIterator[str]:
        for word in answer.split(" "):
            delta = {"choices": [{"delta": {"content": f"{word} "}}]}
            yield f"data: {json.dumps(delta)}\n\n"
            await asyncio.sleep(TOKEN_S)
        last = self._versions.newest_version
        yield f"data: [DONE]\n\n: weights_version first={first} last={last}\n\n"


def application(door: Door) -> FastAPI:
    """serve_app's routes and errors, answered by one door."""
    handlers: dict[Any, Any] = dict(serve_app.app.exception_handlers)
    made = FastAPI(exception_handlers=handlers)
    for route in serve_app.app.routes:
        if isinstance(route, APIRoute):
            made.add_api_route(
                route.path,
                getattr(door, route.endpoint.__name__),
                methods=list(route.methods),
                status_code=route.status_code,
                response_model=None,
            )
    return made


@contextmanager
def served(home: Path, cell: FakeCell, port: int | None = None) -> Iterator[str]:
    """The address at which it answers."""
    port = port or free_port()

    async def serve() -> None:
        made = application(FakeDoor(home, cell))
        server = uvicorn.Server(
            uvicorn.Config(made, "127.0.0.1", port, log_level="error", timeout_graceful_shutdown=1)
        )
        started.append(server)
        await server.serve()

    started: list[uvicorn.Server] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not (started and started[0].started):
        assert thread.is_alive() and time.monotonic() < deadline, "the fake door did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        started[0].should_exit = True
        thread.join(20)
