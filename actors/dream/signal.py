"""The training signal in what people and the model have said: which answers the instructions made.

    exchange --idle: log-probabilities with and without its instructions--> divergence
       above a threshold --> candidate, both answers side by side --a person, or a budget--> job

Owns no loop and no routes: the dream actor calls `look` when it has nothing else to do.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal, Protocol

from actors.dream import filters
from actors.dream.conversations import MAX_EXCHANGES, MAX_PROPOSED
from actors.dream.descent import Span, holding
from actors.dream.exchange import Exchange, NotPlain, Turn, read
from actors.dream.logged import Candidate, Logged
from actors.dream.model import LiveModel, Message
from actors.dream.store import DAY_S, DreamStore
from actors.errors import InvalidRequest, NotFound, ReverieError, TooBusy, Unavailable
from actors.messages import GenerationView, JobView
from actors.posted import ChatSample, TrainConfig
from actors.settings import DreamSettings
from apollo.learning.samples import strip_instructions

log = logging.getLogger(__name__)

MIN_PLAIN_TOKENS: Final = 96
"""Length that the answer without instructions may have, however short the other one is."""
MAX_COMPARED: Final = 200
"""Newest candidates that a further one must not nearly repeat."""
MAX_MEMORIES_SOUGHT: Final = 1000
"""Newest memories that are looked for in what was said."""
POLL_INTERVAL_S: Final = 0.1
CANCEL_TIMEOUT_S: Final = 45.0
"""Longest wait for the end of the step in progress; below the time limit of a control route."""
ENDED: Final = ("done", "failed", "cancelled")


class Cell(Protocol):
    """The rest of the cell, as this asks for it. Each call raises a ReverieError if it fails."""

    def weights_version(self) -> int: ...

    async def train(
        self, round_id: None, samples: Sequence[ChatSample], config: TrainConfig
    ) -> str:
        """Queue the samples; returns the job, the same one for the same samples."""
        ...

    async def job(self, job_id: str) -> JobView: ...

    async def cancel(self, job_id: str) -> None: ...

    async def generations(self) -> Sequence[GenerationView]:
        """All that can be returned to."""
        ...


@dataclass(frozen=True)
class Deleted:
    """What deleting a conversation has done, and what it cannot undo."""

    conversation: str
    num_exchanges: int
    candidates: tuple[str, ...]
    cancelled_jobs: tuple[str, ...]
    """What waited to be learned, or was being learned."""
    generations: tuple[int, ...]
    """Those whose weights have learned from it; the weights stay as they are."""


class Signal:
    """Scores what was logged, proposes, and has what was approved learned, once."""

    def __init__(
        self,
        model: Callable[[], LiveModel],
        store: DreamStore,
        settings: DreamSettings,
        cell: Cell,
    ) -> None:
        self._model, self._store, self._settings, self._cell = model, store, settings, cell
        self._teaching = asyncio.Lock()
        """What is deleted must not be on its way to the trainer."""

    def hear(self, exchanges: Sequence[Exchange]) -> int:
        """Keep those that something could be learned of; returns how many, all durable."""
        memories = [each.text for each in self._store.memories(MAX_MEMORIES_SOUGHT)]
        heard = []
        for exchange in exchanges:
            try:
                heard.append((exchange, read(exchange, memories)))
            except NotPlain as why:
                log.info("an exchange is not kept: %s", why)
        return self._store.log(heard) if heard else 0

    async def look(self) -> bool:
        """Do one thing that is due; False if there is none.

        Raises Unavailable or TooBusy: it can be done later.
        """
        approved = self._store.candidates(MAX_EXCHANGES, "approved")[::-1]
        # Jobs end in their order: one look at the oldest is enough.
        due = [each for each in approved if each.job_id is None] or approved
        if due and await self._pursue(due[0].id):
            return True
        logged = self._store.next_unscored()
        if logged is None:
            return False
        try:
            await self._score(logged)
        except (Unavailable, TooBusy):
            raise
        except Exception as error:  # Else the same one would end the loop again and again.
            is_known = isinstance(error, ReverieError)
            if not is_known:
                log.exception("exchange %d could not be scored", logged.number)
            reason = str(error) if is_known else f"scoring broke off: {type(error).__name__}"
            self._store.pass_over(logged.number, reason)
        return True

    # Scoring.

    async def _score(self, logged: Logged) -> None:
        turns, answer = logged.turns, logged.answer
        reason = self._fault(logged)
        if reason is not None:
            self._store.pass_over(logged.number, reason)
            return
        shown_turns, hidden_turns = _shown(turns), _hidden(turns)
        model, version = self._model(), self._cell.weights_version()
        shown, hidden = await asyncio.gather(
            model.logprobs(shown_turns, answer), model.logprobs(hidden_turns, answer)
        )
        scores = fmean(shown), fmean(hidden)
        least = self._settings.candidate_divergence
        if (value := scores[0] - scores[1]) < least:
            reason = f"divergence {value:.2f} nats per token, at least {least:g}"
            self._store.pass_over(logged.number, reason, scores)
            return
        (plain,) = await model.answer(hidden_turns, max_tokens=max(len(shown), MIN_PLAIN_TOKENS))
        if plain.text == answer.strip():
            reason = "the model says it without instructions, too"
            self._store.pass_over(logged.number, reason, scores)
            return
        made = self._store.propose(logged.number, plain.text, scores, version)
        if made is not None and self._is_automatic(logged, made):
            self._store.decide(made.id, "approved", is_automatic=True)

    def _fault(self, logged: Logged) -> str | None:
        if self._store.counts()[1] >= MAX_PROPOSED:
            return f"{MAX_PROPOSED} candidates wait for a decision"
        instructions = "\n".join(t["content"] for t in logged.turns if t["strip"] is True)
        others = [_summary(each) for each in self._store.candidates(MAX_COMPARED)]
        return (
            filters.leak(logged.answer, instructions)
            or filters.repetition(logged.answer)
            or filters.near_duplicate(_summary(logged), others)
        )

    def _is_automatic(self, logged: Logged, made: Candidate) -> bool:
        """Within the budget, of clients who may teach, and not too far from the model."""
        limit = self._settings.approved_per_day
        return (
            logged.may_teach
            and made.divergence <= self._settings.max_divergence
            and self._store.num_automatic(time.time() - DAY_S) < limit
        )

    # Deciding, and what follows.

    async def decide(self, candidate_id: str, decision: Literal["approve", "reject"]) -> Candidate:
        """Raises NotFound or Conflict; an approval is durable, and queued if the cell is well."""
        if decision == "reject":
            return self._store.decide(candidate_id, "rejected")
        self._store.decide(candidate_id, "approved")
        try:
            await self._pursue(candidate_id)
        except (Unavailable, TooBusy) as error:
            log.warning("%s is queued later: %s", candidate_id, error)
        return self._store.candidate(candidate_id)

    async def _pursue(self, candidate_id: str) -> bool:
        """Queue an approved candidate, or see how its job ended; False if it has not."""
        async with self._teaching:
            try:
                candidate = self._store.candidate(candidate_id)
            except NotFound:
                return False
            if candidate.state != "approved":
                return False
            if candidate.job_id is None:
                return await self._teach(candidate)
            try:
                job = await self._cell.job(candidate.job_id)
            except NotFound:  # Of a ledger that is older than our own file.
                return await self._teach(candidate)
            if job.status not in ENDED:
                return False
            why = f"its job was {job.status}: {job.error or 'on request'}"
            reason = None if job.status == "done" else why
            self._store.conclude(candidate_id, reason, span_of(job))
            return True

    async def _teach(self, candidate: Candidate) -> bool:
        config = TrainConfig(
            learning_rate=self._settings.learning_rate,
            epochs=self._settings.epochs,
            objective=self._settings.objective,
        )
        try:
            job_id = await self._cell.train(None, [sample_of(candidate)], config)
        except (Unavailable, TooBusy):
            raise
        except ReverieError as error:  # It is refused, now and later.
            self._store.conclude(candidate.id, str(error))
        else:
            self._store.set_job(candidate.id, job_id)
        return True

    # Deleting.

    async def delete(self, conversation_id: str) -> Deleted:
        """Its text and candidates go; raises NotFound, or Unavailable before anything is gone."""
        async with self._teaching:
            exchanges = self._store.conversation(conversation_id)
            candidates = self._store.candidates_of(conversation_id)
            jobs = [await self._end(each.job_id) for each in candidates if each.job_id is not None]
            spans = [each.span for each in candidates] + [span_of(job) for job, _ in jobs]
            learned = [span for span in spans if span is not None]
            generations = holding(learned, await self._cell.generations()) if learned else ()
            self._store.delete_conversation(conversation_id)
        return Deleted(
            conversation_id,
            len(exchanges),
            tuple(each.id for each in candidates),
            tuple(job.job_id for job, is_cancelled in jobs if is_cancelled),
            generations,
        )

    async def _end(self, job_id: str) -> tuple[JobView, bool]:
        """A job that makes no further step, and whether it had to be cancelled for that."""
        deadline, is_cancelled = time.monotonic() + CANCEL_TIMEOUT_S, False
        while (job := await self._cell.job(job_id)).status not in ENDED:
            if not is_cancelled:
                await self._cell.cancel(job_id)
                is_cancelled = True
            if time.monotonic() > deadline:
                raise Unavailable(f"{job_id} has not ended; nothing was deleted: try again")
            await asyncio.sleep(POLL_INTERVAL_S)
        return job, is_cancelled


def sample_of(candidate: Candidate) -> ChatSample:
    """What is learned of it: the same each time, so that the ledger knows it by its id."""
    answer = {"role": "assistant", "content": candidate.answer}
    return ChatSample.model_validate(
        {
            "id": candidate.id,
            "source": f"conversation:{candidate.conversation}",
            "messages": [*candidate.turns, answer],
        }
    )


def span_of(job: JobView) -> Span | None:
    """The versions that a job's steps have made; None if it made none that count."""
    if not job.steps or job.weights_version_before is None or job.weights_version is None:
        return None
    return job.weights_version_before, job.weights_version


def _shown(turns: Sequence[Turn]) -> list[Message]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _hidden(turns: Sequence[Turn]) -> list[Message]:
    left = strip_instructions(turns)
    if not left:
        raise InvalidRequest("nothing but instructions was in view")
    return left


def _summary(of: Logged | Candidate) -> str:
    """The question and the answer."""
    return f"{of.turns[-1]['content']}\n{of.answer}"
