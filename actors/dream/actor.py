"""Owns what is proposed, judged and gated: one round at a time, when nobody needs the machine.

    POST /dream --> asked --+--> draw a behaviour --> Dream.run --> the next
    idle for a while -------+         ^ a round that was cut short comes first

Its database is the truth: what was asked, the open round, and every item survive this process.
"""

import asyncio
import logging
import os
import random
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import ray

from actors import logs
from actors.calls import in_words
from actors.dream.behaviour import Behaviour
from actors.dream.cell_calls import CellCalls
from actors.dream.curriculum import RETEST_S, Progress, draw, temperature
from actors.dream.exchange import Exchange
from actors.dream.logged import Candidate, CandidateState, Conversation, Logged
from actors.dream.manners import PoliteModel
from actors.dream.model import EngineModel, Message, divergence, engine_client
from actors.dream.records import Item, Round
from actors.dream.round import Dream
from actors.dream.signal import Deleted, Signal
from actors.dream.store import DreamStore, Memory
from actors.errors import Conflict, InvalidRequest, TooBusy, Unavailable
from actors.events import Events
from actors.messages import CellPaths, DreamReport
from actors.posted import DecisionRequest, DreamRequest, MemoriesRequest, ScoreRequest
from actors.settings import Settings
from actors.traffic import Traffic
from actors.versions import VersionCounter

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from actors.checkpoint import Checkpointer
    from actors.trainer import Trainer

log = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 0.5
RETRY_S: Final = 10.0
MAX_LISTED: Final = 1000


class Dreamer:
    """The dream loop of one cell."""

    def __init__(
        self,
        settings: Settings,
        paths: CellPaths,
        trainer: "ActorProxy[Trainer]",
        checkpoint: "ActorProxy[Checkpointer]",
    ) -> None:
        self._settings, self._paths = settings, paths
        self._versions = VersionCounter(paths.versions)
        logs.configure(settings.logs, "dream", lambda: self._versions.weights_version)
        self._events = Events(Path(paths.ledger).parent, "dream")
        self._traffic = Traffic(paths.traffic)
        self._calls = CellCalls(settings, self._versions, trainer, checkpoint)
        self._store: DreamStore
        self._engine: EngineModel
        self._signal: Signal
        self._loop: asyncio.Task[None] | None = None
        self._running: asyncio.Task[Round] | None = None
        self._is_stopping = False
        self._round: Round | None = None
        self._stage: tuple[str, int, int] | None = None
        self._paused: str | None = None
        self._reason: str | None = None

    def __repr__(self) -> str:
        return f"dream of {self._paths.model}"

    @ray.method
    async def start(self) -> DreamReport:
        """Open the database and begin to look for something to dream of."""
        name = Path(self._paths.model_dir).name
        self._store = DreamStore(self._paths.dream)
        self._engine = EngineModel(engine_client(self._paths.socket), name)
        self._signal = Signal(self._model, self._store, self._settings.dream, self._calls)
        self._loop = asyncio.create_task(self._dream_on())
        return self._describe()

    @ray.method
    async def report(self) -> DreamReport:
        """The state of the loop."""
        return self._describe()

    def _describe(self) -> DreamReport:
        stage, done, total = self._stage or (None, 0, 0)
        state: Literal["idle", "dreaming", "waiting"] = "idle"
        if self._round is not None:
            is_quiet = self._traffic.idle_s() >= self._settings.dream.yield_s
            state = "dreaming" if is_quiet else "waiting"
        unscored, proposed = self._store.counts()
        return DreamReport(
            pid=os.getpid(),
            state=state,
            round_id=self._round.id if self._round else None,
            behaviour=self._round.behaviour if self._round else None,
            stage=stage,
            done=done,
            total=total,
            asked=len(self._asked()),
            unscored=unscored,
            proposed=proposed,
            kl=self._kl(),
            paused=self._paused,
            reason=self._reason,
        )

    def _kl(self) -> float | None:
        last = self._store.note("last")
        return None if last is None else float(last["measured"]["kl"])

    # What clients ask.

    @ray.method
    async def dream(self, request: DreamRequest) -> DreamReport:
        """Queue rounds; durable when it returns. Raises NotFound, Conflict or TooBusy."""
        known = self._store.behaviours()
        if request.behaviour is not None:
            self._store.behaviour(request.behaviour)
        elif not known:
            raise Conflict(
                "there is no behaviour to dream of; PUT /behaviours/{name} makes one"
            ).about("behaviour")
        elif all(progress.standing == "stopped" for _, progress in known):
            raise Conflict(
                "the gate has stopped every behaviour; name the one to try all the same, or change "
                "it with PUT /behaviours/{name}"
            ).about("behaviour")
        asked, limit = self._asked(), self._settings.dream.max_rounds_queued
        if len(asked) + request.rounds > limit:
            raise TooBusy(
                f"{len(asked)} rounds are queued and {request.rounds} more would exceed the bound "
                f"of {limit}; ask again later"
            )
        self._store.write_note("asked", asked + [request.behaviour] * request.rounds)
        return self._describe()

    @ray.method
    async def stop_dreaming(self) -> DreamReport:
        """Forget the rounds that were asked for, and take back the one that runs."""
        self._store.write_note("asked", [])
        if self._running is not None:
            self._is_stopping = True
            self._running.cancel()
        return self._describe()

    @ray.method
    async def rounds(self, limit: int) -> list[Round]:
        """Newest first."""
        return self._store.rounds(limit)

    @ray.method
    async def round(self, round_id: str) -> tuple[Round, list[Item]]:
        """One round with its items; raises NotFound."""
        return self._store.round(round_id), self._store.items(round_id)

    @ray.method
    async def behaviours(self) -> list[tuple[Behaviour, Progress]]:
        return self._store.behaviours()

    @ray.method
    async def behaviour(self, name: str) -> tuple[Behaviour, Progress]:
        """Raises NotFound."""
        return self._store.behaviour(name)

    @ray.method
    async def put_behaviour(self, behaviour: Behaviour) -> tuple[Behaviour, Progress]:
        """Add or replace one; raises Conflict while a round of it runs."""
        self._refuse_if_dreamt_of(behaviour.name)
        self._store.put_behaviour(behaviour)
        return self._store.behaviour(behaviour.name)

    @ray.method
    async def delete_behaviour(self, name: str) -> None:
        """Raises NotFound, or Conflict while a round of it runs."""
        self._refuse_if_dreamt_of(name)
        self._store.delete_behaviour(name)

    def _refuse_if_dreamt_of(self, name: str) -> None:
        if self._round is not None and self._round.behaviour == name:
            raise Conflict(f"{self._round.id} dreams of {name!r}; DELETE /dream stops it")

    @ray.method
    async def add_memories(self, request: MemoriesRequest) -> list[Memory]:
        """All or none, as they are kept; durable when it returns."""
        now = time.time()
        made = [
            Memory(
                each.id or f"memory-{secrets.token_hex(8)}",
                each.text,
                tuple(each.tags),
                now if each.created is None else each.created,
            )
            for each in request.memories
        ]
        return self._store.add_memories(made)

    @ray.method
    async def memories(self, limit: int) -> list[Memory]:
        """Newest first."""
        return self._store.memories(min(limit, MAX_LISTED))

    @ray.method
    async def delete_memory(self, memory_id: str) -> None:
        """Raises NotFound."""
        self._store.delete_memory(memory_id)

    @ray.method
    async def score(self, request: ScoreRequest) -> dict[str, float]:
        """Mean log-probability per token of the last message with the instruction and without."""
        *before, last = request.messages
        if last.role != "assistant":
            raise InvalidRequest(
                f"messages: the last one is the {last.role}'s; end with the answer to score"
            ).about("messages")
        turns: list[Message] = [{"role": m.role, "content": m.content} for m in before]
        shown = [turn for turn in turns if turn["role"] in request.strip]
        hidden = [turn for turn in turns if turn["role"] not in request.strip]
        if not shown or not hidden:
            what = "no message is stripped" if not shown else "every message is stripped"
            raise InvalidRequest(f"strip: {what}; there is nothing to compare").about("strip")
        with_it, without = await divergence(self._engine, shown, hidden, last.content)
        return {"with": with_it, "without": without, "divergence": with_it - without}

    # What was said.

    @ray.method
    async def hear(self, exchanges: tuple[Exchange, ...]) -> int:
        """Keep those that something could be learned of; returns how many, durably."""
        return self._signal.hear(exchanges)

    @ray.method
    async def conversations(self, limit: int) -> list[Conversation]:
        """Those that changed last come first."""
        return self._store.conversations(min(limit, MAX_LISTED))

    @ray.method
    async def conversation(self, conversation_id: str) -> list[Logged]:
        """Its exchanges; raises NotFound."""
        return self._store.conversation(conversation_id)

    @ray.method
    async def delete_conversation(self, conversation_id: str) -> Deleted:
        """Raises NotFound, or Unavailable before anything is gone."""
        return await self._signal.delete(conversation_id)

    @ray.method
    async def candidates(self, limit: int, state: CandidateState | None) -> list[Candidate]:
        """Newest first."""
        return self._store.candidates(min(limit, MAX_LISTED), state)

    @ray.method
    async def candidate(self, candidate_id: str) -> Candidate:
        """Raises NotFound."""
        return self._store.candidate(candidate_id)

    @ray.method
    async def decide(self, candidate_id: str, request: DecisionRequest) -> Candidate:
        """Raises NotFound, or Conflict."""
        return await self._signal.decide(candidate_id, request.decision)

    # The loop.

    async def _dream_on(self) -> None:
        try:
            while True:
                of = self._store.open_round() or self._next_round()
                if of is not None:
                    await self._run(of)
                elif not await self._listen():
                    await asyncio.sleep(LOOK_INTERVAL_S)
        except Exception as error:
            log.exception("the dream loop ended")
            self._reason = f"dreaming ended: {in_words(error)}"

    async def _listen(self) -> bool:
        """Look at what was said, while there is no round; False if nothing is due."""
        try:
            return await self._signal.look()
        except (Unavailable, TooBusy) as error:
            log.warning("what was said waits: %s", error)
            await asyncio.sleep(RETRY_S)
            return True

    def _asked(self) -> list[str | None]:
        return list(self._store.note("asked") or [])

    def _next_round(self) -> Round | None:
        """Begin a round, if one was asked for, or may be dreamt by itself."""
        asked, dream = self._asked(), self._settings.dream
        if not asked and not (dream.when_idle and self._traffic.idle_s() >= dream.idle_s):
            return None
        self._paused = self._over_budget()
        if self._paused is not None:
            return None
        name, rounds = asked[0] if asked else None, self._store.rounds(MAX_LISTED)
        rng = random.Random(dream.seed + len(rounds))
        is_stale = bool(rounds) and time.time() - (rounds[0].ended or 0) >= RETEST_S
        known = [progress for _, progress in self._store.behaviours()]
        if name is None:
            chosen = draw(known, rng, may_retest=bool(asked) or is_stale)
        else:
            chosen = next((each for each in known if each.name == name), None)
        if chosen is None:
            if asked:
                why = "all are stopped" if name is None else f"{name!r} was deleted"
                log.warning("a round that was asked for is not begun: %s", why)
            self._store.write_note("asked", asked[1:])
            return None
        begun = self._store.begin_round(chosen.name, temperature(chosen.failure_rate))
        self._store.write_note("asked", asked[1:])
        return begun

    def _over_budget(self) -> str | None:
        dream, used = self._settings.dream, self._store.usage(time.time())
        for name, value, limit in (
            ("max_tokens_per_day", used.tokens, dream.max_tokens_per_day),
            ("max_steps_per_day", used.steps, dream.max_steps_per_day),
            ("max_seconds_per_day", used.seconds, dream.max_seconds_per_day),
        ):
            if value >= limit:
                return f"dream.{name}={limit:g} is used up ({value:g} in 24 hours)"
        return None

    async def _run(self, of: Round) -> None:
        self._round = of
        self._events.note("round_begun", round=of.id, behaviour=of.behaviour, state=of.state)
        dream = Dream(self._model(), self._store, self._settings.dream, self._calls, self._tell)
        self._running = asyncio.create_task(dream.run(of))
        try:
            await asyncio.wait_for(self._running, self._settings.dream.round_timeout_s)
        except (Unavailable, TooBusy) as error:
            log.warning("%s waits: %s", of.id, error)
            self._paused = str(error)
            await asyncio.sleep(RETRY_S)
            self._paused = None
        except asyncio.CancelledError:
            if not self._is_stopping:
                raise
            await self._end(dream, of, "it was stopped on request")
        except TimeoutError:
            limit = self._settings.dream.round_timeout_s
            await self._end(dream, of, f"it took longer than dream.round_timeout_s={limit:g}")
        except Exception as error:
            log.exception("%s ended", of.id)
            await self._end(dream, of, in_words(error))
        finally:
            measured = of.attempts[-1].measured if of.attempts else None
            kl = measured and measured["kl"]
            self._events.note("round_left", round=of.id, state=of.state, kl=kl)
            self._is_stopping, self._running = False, None
            self._round, self._stage = None, None

    async def _end(self, dream: Dream, of: Round, why: str) -> None:
        """A round that broke off: what it taught is taken back."""
        if of.attempts:
            await dream.give_up(of)
        of.state, of.reason, of.ended = "failed", why, time.time()
        self._store.save_round(of)

    def _model(self) -> PoliteModel:
        return PoliteModel(self._engine, self._traffic.idle_s, self._settings.dream.yield_s)

    def _tell(self, stage: str, done: int, total: int) -> None:
        self._stage = (stage, done, total)
