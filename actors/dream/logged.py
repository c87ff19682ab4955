"""What was said as it is kept, and what became of it: made by the store, shown by routes."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any, Literal

from actors.dream.descent import Span
from actors.dream.exchange import Turn

CandidateState = Literal["proposed", "approved", "rejected", "trained"]


@dataclass(frozen=True)
class Logged:
    """One exchange, and what became of it."""

    number: int
    conversation: str
    created: float
    turns: tuple[Turn, ...]
    """Role, content, and `strip`: what of it is an instruction."""
    answer: str
    first_version: int
    last_version: int
    may_teach: bool
    state: Literal["new", "scored", "passed over"] = "new"
    reason: str | None = None
    shown: float | None = None
    """Mean log-probability per token of the answer with the instructions in view, in nats."""
    hidden: float | None = None
    """The same without them."""


@dataclass(frozen=True)
class Candidate:
    """An exchange that the instructions made what it is, and may be learned without them."""

    id: str
    """Also that of its sample."""
    conversation: str
    created: float
    state: CandidateState
    turns: tuple[Turn, ...]
    answer: str
    """What was answered, with the instructions in view."""
    plain: str
    """What the model answers without them, at temperature 0."""
    shown: float
    hidden: float
    divergence: float
    """The difference of the two, in nats per token."""
    weights_version: int
    """Which both were measured with."""
    decided: float | None = None
    is_automatic: bool = False
    job_id: str | None = None
    span: Span | None = None
    """The versions in which it was learned, as they were when its job ended."""
    reason: str | None = None
    """Why it was rejected, where nobody did."""


@dataclass(frozen=True)
class Conversation:
    """Exchanges that went on from each other, without their text."""

    id: str
    created: float
    changed: float
    num_exchanges: int
    candidates: tuple[str, ...]


def logged_of(row: sqlite3.Row) -> Logged:
    fields: dict[str, Any] = dict(row)
    del fields["digest"]
    fields |= {"turns": tuple(json.loads(row["turns"])), "may_teach": bool(row["may_teach"])}
    return Logged(**fields)


def candidate_of(row: sqlite3.Row) -> Candidate:
    return Candidate(
        id=row["id"],
        conversation=row["conversation"],
        created=row["created"],
        state=row["state"],
        turns=tuple(json.loads(row["turns"])),
        answer=row["answer"],
        plain=row["plain"],
        shown=row["shown"],
        hidden=row["hidden"],
        divergence=row["shown"] - row["hidden"],
        weights_version=row["version"],
        decided=row["decided"],
        is_automatic=bool(row["is_automatic"]),
        job_id=row["job_id"],
        span=None if row["learned_until"] is None else (row["learned_after"], row["learned_until"]),
        reason=row["reason"],
    )
