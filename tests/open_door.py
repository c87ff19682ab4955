"""The real application in one process: Guard, routes, errors and limits, over a cell that is none.

    client --ASGI--> serve_app.app --> OpenDoor._ask --> Desk, Dreamer (real, on real databases)
                                             |        --> MadeUpJournal: three generations
                                             +--aiohttp--> MadeUpEngine on a Unix socket

What carries calls between processes is a direct call; nothing is learned, and nothing dreamt.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import httpx
from aiohttp import web
from ray import serve

import serve_app
from actors.desk import Desk
from actors.dream.actor import Dreamer
from actors.dream.signal import Signal
from actors.dream.store import DreamStore
from actors.encoding import Encoder
from actors.errors import NotFound
from actors.events import Events
from actors.ledger import Ledger
from actors.messages import (
    CellPaths,
    CellReport,
    Checkpoint,
    CheckpointReport,
    DreamReport,
    EngineReport,
    GenerationView,
    JobView,
    TrainerReport,
    Verification,
)
from actors.past import Drift, Forgotten, GenerationDetail, Learned
from actors.posted import CheckpointRequest, ForgetRequest, RollbackRequest, TrainRequest
from actors.settings import LimitSettings, Settings
from actors.traffic import Traffic
from actors.versions import VersionCounter
from door.exchanges import ExchangeLog
from door.feed import Feed
from door.keys import KeyStore
from door.limits import Slots
from door.proxy import EngineProxy
from tests.fake_model import FakeModel

BASE = "http://127.0.0.1:8000"
MAX_LEN = 512
END = "</s>"


class ByteTokenizer:
    """A token for each byte and one for the end of a turn; as much of a tokenizer as is asked."""

    added_tokens_decoder: ClassVar = {0: SimpleNamespace(special=True)}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids: list[int] = []
        for at, part in enumerate(text.split(END)):
            ids += [0] * bool(at) + [1 + byte for byte in part.encode()]
        return {"input_ids": ids}

    def decode(self, ids: list[int]) -> str:
        return bytes(each - 1 for each in ids if each).decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False, **_: Any
    ) -> str:
        text = "".join(f"<{each['role']}>{each['content']}{END}" for each in messages)
        return text + "<assistant>" * add_generation_prompt


class OpenDesk(Desk):
    """The trainer without its training."""

    def __init__(
        self, settings: Settings, ledger: Ledger, versions: VersionCounter, events: Events
    ) -> None:
        super().__init__()
        self._events = events
        self._settings, self._ledger, self._versions = settings, ledger, versions
        self._encoder = Encoder(ByteTokenizer(), 257, MAX_LEN)


@dataclass
class MadeUpJournal:
    """Three generations of nothing."""

    desk: Any  # An OpenDesk, whose methods mypy takes for remote ones.
    kept: list[GenerationView] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number in range(3):
            self._keep("commit" if number else "base", None)

    def _keep(self, kind: str, returns_to: int | None) -> Checkpoint:
        at = len(self.kept)
        parent = at - 1 if at else None
        self.kept = [replace(each, is_public=False) for each in self.kept[-20:]]
        number = self.kept[-1].generation + 1 if self.kept else 0
        self.kept.append(
            GenerationView(number, kind, parent, 0, 0.0, 1, True, True, returns_to, "root")
        )
        return Checkpoint(number, 0, 0.0, 1)

    def commit(self, request: CheckpointRequest) -> Checkpoint:
        return self._keep("commit", None)

    def history(self) -> list[GenerationView]:
        return self.kept[::-1]

    def _find(self, generation: int) -> GenerationView:
        for each in self.kept:
            if each.generation == generation:
                return each
        raise NotFound(f"there is no generation {generation}").about("generation")

    def show(self, generation: int) -> GenerationDetail:
        nothing = Learned((), 0, 0, None, None, None)
        return GenerationDetail(self._find(generation), nothing, Drift(10, 1, 1), None, False, ())

    def verify(self) -> Verification:
        return Verification((), (), (), 0)

    def roll_back(self, request: RollbackRequest) -> Checkpoint:
        return self._keep("rollback", self._find(request.generation).generation)

    def forget(self, request: ForgetRequest) -> Forgotten:
        found = self.desk.remembered((request.item,), (0,))
        if found.missing is not None:
            raise NotFound(found.missing).about("item")
        self.desk._ledger.forget((request.item,))
        return Forgotten(request.item, 0)


class DirectCell:
    """What the dream loop asks of the cell."""

    def __init__(self, desk: Any, journal: MadeUpJournal) -> None:
        self._desk, self._journal = desk, journal

    def weights_version(self) -> int:
        return 0

    async def train(self, round_id: None, samples: Sequence[Any], config: Any) -> str:
        posted = TrainRequest(samples=list(samples), config=config)
        return str(self._desk.submit(posted).job_id)

    async def job(self, job_id: str) -> JobView:
        view: JobView = self._desk.job(job_id)
        return view

    async def cancel(self, job_id: str) -> None:
        self._desk.cancel(job_id)

    async def generations(self) -> Sequence[GenerationView]:
        return self._journal.history()


class OpenDreamer(Dreamer):
    """The dream actor without its loop."""

    def __init__(self, settings: Settings, paths: CellPaths, cell: DirectCell) -> None:
        nobody: Any = None
        super().__init__(settings, paths, nobody, nobody)
        self._store = DreamStore(paths.dream)
        model: Any = FakeModel()
        self._engine = model
        self._signal = Signal(lambda: model, self._store, settings.dream, cell)


async def made_up_answer(request: web.Request) -> web.StreamResponse:
    """What vLLM would say, about; the words are those that were asked."""
    try:
        asked = json.loads(await request.read() or b"{}")
    except ValueError:
        return web.json_response({"error": {"message": "no JSON"}}, status=400)
    text = json.dumps(asked)[:200]
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    if not (isinstance(asked, dict) and asked.get("stream")):
        choice = {"message": {"role": "assistant", "content": text}}
        return web.json_response({"choices": [choice], "usage": usage})
    stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await stream.prepare(request)
    for word in text.split()[:3]:
        event = {"choices": [{"delta": {"content": word}}]}
        await stream.write(f"data: {json.dumps(event)}\n\n".encode())
    if (asked.get("stream_options") or {}).get("include_usage"):
        await stream.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
    await stream.write(b"data: [DONE]\n\n")
    await stream.write_eof()
    return stream


class OpenDoor(serve_app.Ingress.func_or_class.__mro__[1]):  # type: ignore[name-defined,misc]
    """The ingress, but for the way to actors."""

    def __init__(self, settings: Settings, paths: CellPaths) -> None:
        self._settings, self._paths = settings, paths
        self._keys = KeyStore(settings.home)
        self._slots = Slots(settings.limits.max_ongoing_requests)
        self._log = ExchangeLog(settings.dream.log_conversations, self._deliver)
        self._feed = Feed()
        self._versions = VersionCounter.create(paths.versions)
        self._traffic = Traffic.create(paths.traffic)
        self.ledger = Ledger(paths.ledger)
        events = Events(Path(paths.ledger).parent, "trainer")
        self._desk = OpenDesk(settings, self.ledger, self._versions, events)
        self.journal = MadeUpJournal(self._desk)
        self.dreamer: Any = OpenDreamer(settings, paths, DirectCell(self._desk, self.journal))
        timeout_s = settings.limits.request_timeout_s
        watched = (self._versions, self._traffic, self._latencies)
        self._engine = EngineProxy(paths.socket, timeout_s, *watched)
        self._report = CellReport(
            1, "ready", None, paths, (), 0, 1,
            EngineReport(1, (), True), TrainerReport(1, 0), CheckpointReport(1, 0, 0),
            DreamReport(1),
        )  # fmt: skip

    async def _ask(
        self, role: str, method: str, *arguments: Any, timeout_s: float | None = None
    ) -> Any:
        self._ready()
        actor: Any = {"trainer": self._desk, "checkpoint": self.journal, "dream": self.dreamer}
        made = getattr(actor[role], method)(*arguments)
        return await made if asyncio.iscoroutine(made) else made

    async def close(self) -> None:
        await self._engine.close()
        self.ledger.close()
        self.dreamer._store.close()


@contextmanager
def standing_in(door: OpenDoor) -> Iterator[None]:
    """Have the application's routes answered by this door."""
    with patch.object(serve, "get_replica_context") as context:
        context.return_value = SimpleNamespace(servable_object=door)
        yield


@asynccontextmanager
async def opened(home: Path, **limits: Any) -> AsyncIterator[OpenDoor]:
    """A door over an empty home."""
    run, state = home / "run", home / "state" / "made-up"
    run.mkdir(parents=True)
    state.mkdir(parents=True)
    paths = CellPaths(str(home / "models" / "made-up"), str(run), str(state / "ledger.sqlite"))
    application = web.Application(client_max_size=64 * 1024**2)
    application.router.add_route("*", "/{path:.*}", made_up_answer)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, paths.socket).start()
    door = OpenDoor(Settings(home=home, limits=LimitSettings(**limits)), paths)
    try:
        with standing_in(door):
            yield door
    finally:
        await door.close()
        await runner.cleanup()


def client(key: str | None = None, **more: Any) -> httpx.AsyncClient:
    """Speaks to the application as a server would; what it raises is a 500, as there."""
    transport = httpx.ASGITransport(serve_app.app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(transport=transport, base_url=BASE, headers=headers, **more)


def train_body(text: str = "Reverie.", **more: Any) -> dict[str, Any]:
    """A sample that is taken."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": text}]
    return {"samples": [{"messages": turns} | more]}
