"""What was logged of conversations, and the candidates among it; until somebody deletes it.

    new --score--> scored, as a candidate:  proposed --> approved --> trained
     |                                         +-------> rejected <------+  (its job failed)
     +-----------> passed over, with a reason

An exchange is one answer with the messages before it. Exchanges are one conversation where one goes
on from what another had ended with. A deleted row leaves nothing in the file: SQLite zeroes it.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from typing import Final, Literal

from actors.database import Database
from actors.dream.descent import Span
from actors.dream.exchange import INSTRUCTIONS, Exchange, Said, Turn
from actors.dream.logged import (
    Candidate,
    CandidateState,
    Conversation,
    Logged,
    candidate_of,
    logged_of,
)
from actors.errors import Conflict, NotFound

MAX_EXCHANGES: Final = 1000
"""Most that are kept, half a GiB at the very worst; the oldest go that are no candidates."""
MAX_PROPOSED: Final = 500
"""More candidates than anybody reads; what comes then is passed over."""

TABLES: Final = (
    """CREATE TABLE exchanges (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation TEXT NOT NULL,
        created REAL NOT NULL,
        digest TEXT NOT NULL,
        turns TEXT NOT NULL,
        answer TEXT NOT NULL,
        first_version INTEGER NOT NULL,
        last_version INTEGER NOT NULL,
        may_teach INTEGER NOT NULL,
        state TEXT NOT NULL DEFAULT 'new',
        reason TEXT,
        shown REAL,
        hidden REAL)""",
    """CREATE TABLE candidates (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        exchange INTEGER NOT NULL UNIQUE REFERENCES exchanges (number) ON DELETE CASCADE,
        created REAL NOT NULL,
        state TEXT NOT NULL DEFAULT 'proposed',
        plain TEXT NOT NULL,
        version INTEGER NOT NULL,
        decided REAL,
        is_automatic INTEGER NOT NULL DEFAULT 0,
        job_id TEXT,
        learned_after INTEGER,
        learned_until INTEGER,
        reason TEXT)""",
    "CREATE INDEX exchanges_by_conversation ON exchanges (conversation)",
    "CREATE INDEX exchanges_by_digest ON exchanges (digest)",
    "CREATE INDEX exchanges_by_state ON exchanges (state)",
    "CREATE INDEX candidates_by_state ON candidates (state)",
)


class Conversations(Database):
    """Every method that changes something is one transaction, on disk when it returns."""

    def log(self, heard: Sequence[tuple[Exchange, Said]]) -> int:
        """Keep exchanges; returns how many. None is kept while all others are candidates."""
        with self._transaction() as db:
            for exchange, said in heard:
                self._insert(exchange, said)
            over = self._scalar("SELECT COUNT(*) FROM exchanges") - MAX_EXCHANGES
            if over <= 0:
                return len(heard)
            gone = db.execute(
                "SELECT number FROM exchanges WHERE number NOT IN (SELECT exchange FROM candidates "
                "WHERE state != 'rejected') ORDER BY number LIMIT ?",
                (over,),
            ).fetchall()
            before = self._scalar("SELECT MAX(number) FROM exchanges") - len(heard)
            db.executemany("DELETE FROM exchanges WHERE number = ?", [tuple(row) for row in gone])
            return len(heard) - sum(int(row["number"]) > before for row in gone)

    def next_unscored(self) -> Logged | None:
        """The newest: what was said lately is nearest to what the model is now."""
        with self._lock:
            row = self._row(
                "SELECT * FROM exchanges WHERE state = 'new' ORDER BY number DESC LIMIT 1"
            )
        return None if row is None else logged_of(row)

    def pass_over(
        self, number: int, reason: str, scores: tuple[float, float] | None = None
    ) -> None:
        """No candidate; an exchange that was deleted meanwhile stays so."""
        shown, hidden = scores or (None, None)
        with self._transaction() as db:
            db.execute(
                "UPDATE exchanges SET state = 'passed over', reason = ?, shown = ?, hidden = ? "
                "WHERE number = ?",
                (reason, shown, hidden, number),
            )

    def propose(
        self, number: int, plain: str, scores: tuple[float, float], version: int
    ) -> Candidate | None:
        """Make a candidate of an exchange; None if that was deleted meanwhile."""
        made = f"candidate-{secrets.token_hex(8)}"
        with self._transaction() as db:
            known = db.execute(
                "UPDATE exchanges SET state = 'scored', shown = ?, hidden = ? WHERE number = ?",
                (*scores, number),
            )
            if not known.rowcount:
                return None
            db.execute(
                "INSERT INTO candidates (id, exchange, created, plain, version) "
                "VALUES (?, ?, ?, ?, ?)",
                (made, number, time.time(), plain, version),
            )
            return self._candidate(made)

    def candidate(self, candidate_id: str) -> Candidate:
        """Raises NotFound."""
        with self._lock:
            return self._candidate(candidate_id)

    def candidates(self, limit: int, state: CandidateState | None = None) -> list[Candidate]:
        """Newest first; all states unless one is named."""
        with self._lock:
            rows = self._db.execute(
                f"{_CANDIDATES} WHERE ?1 IS NULL OR candidates.state = ?1 ORDER BY seq DESC "
                "LIMIT ?2",
                (state, limit),
            ).fetchall()
        return [candidate_of(row) for row in rows]

    def decide(
        self,
        candidate_id: str,
        state: Literal["approved", "rejected"],
        *,
        is_automatic: bool = False,
    ) -> Candidate:
        """The same decision may be said twice. Raises NotFound, or Conflict with what it is."""
        with self._transaction() as db:
            now = self._candidate(candidate_id)
            if now.state not in ("proposed", state):
                raise Conflict(f"{candidate_id} is {now.state} already and stays so").about(
                    "decision"
                )
            if now.state == "proposed":
                db.execute(
                    "UPDATE candidates SET state = ?, decided = ?, is_automatic = ? WHERE id = ?",
                    (state, time.time(), is_automatic, candidate_id),
                )
            return self._candidate(candidate_id)

    def set_job(self, candidate_id: str, job_id: str) -> None:
        """The job that learns an approved candidate."""
        with self._transaction() as db:
            db.execute(
                "UPDATE candidates SET job_id = ? WHERE id = ? AND state = 'approved'",
                (job_id, candidate_id),
            )

    def conclude(self, candidate_id: str, reason: str | None, span: Span | None = None) -> None:
        """An approved candidate was trained; or, with a reason, will not be any further."""
        after, until = span or (None, None)
        with self._transaction() as db:
            db.execute(
                "UPDATE candidates SET state = ?, reason = ?, learned_after = ?, learned_until = ? "
                "WHERE id = ? AND state = 'approved'",
                ("trained" if reason is None else "rejected", reason, after, until, candidate_id),
            )

    def num_automatic(self, since: float) -> int:
        """How many were approved without a person."""
        with self._lock:
            return self._scalar(
                "SELECT COUNT(*) FROM candidates WHERE is_automatic AND decided > ?", since
            )

    def counts(self) -> tuple[int, int]:
        """Exchanges that wait to be scored, and candidates that wait for a decision."""
        with self._lock:
            return (
                self._scalar("SELECT COUNT(*) FROM exchanges WHERE state = 'new'"),
                self._scalar("SELECT COUNT(*) FROM candidates WHERE state = 'proposed'"),
            )

    def conversations(self, limit: int) -> list[Conversation]:
        """Those that changed last come first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT conversation, MIN(exchanges.created) AS begun, COUNT(*) AS num, "
                "MAX(exchanges.created) AS changed, json_group_array(id) AS candidates "
                "FROM exchanges LEFT JOIN candidates ON exchange = number "
                "GROUP BY conversation ORDER BY MAX(number) DESC LIMIT ?",
                (limit,),
            ).fetchall()
        return [
            Conversation(
                row["conversation"],
                row["begun"],
                row["changed"],
                row["num"],
                tuple(each for each in json.loads(row["candidates"]) if each is not None),
            )
            for row in rows
        ]

    def conversation(self, conversation_id: str) -> list[Logged]:
        """Its exchanges as they came; raises NotFound."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM exchanges WHERE conversation = ? ORDER BY number", (conversation_id,)
            ).fetchall()
        if not rows:
            raise NotFound(
                f"there is no conversation {conversation_id!r}; GET /conversations lists them"
            )
        return [logged_of(row) for row in rows]

    def candidates_of(self, conversation_id: str) -> list[Candidate]:
        """As they came."""
        with self._lock:
            rows = self._db.execute(
                f"{_CANDIDATES} WHERE conversation = ? ORDER BY seq", (conversation_id,)
            ).fetchall()
        return [candidate_of(row) for row in rows]

    def delete_conversation(self, conversation_id: str) -> None:
        """With its candidates; nothing of its text stays in the file or in the log beside it.

        Where another process is reading at that moment, the log keeps it until it is next emptied.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM exchanges WHERE conversation = ?", (conversation_id,))
        self.wipe()

    def wipe(self) -> None:
        """Empty the write-ahead log into the file, where deleted rows are zeroes."""
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    # Below, the lock is held.

    def _insert(self, exchange: Exchange, said: Said) -> None:
        self._db.execute(
            "INSERT INTO exchanges (conversation, created, digest, turns, answer, first_version, "
            "last_version, may_teach) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._conversation_of(said),
                exchange.created,
                _digest([*said.turns, {"role": "assistant", "content": said.answer}]),
                json.dumps(said.turns),
                said.answer,
                exchange.first_version,
                exchange.last_version,
                exchange.may_teach,
            ),
        )

    def _conversation_of(self, said: Said) -> str:
        """The one that this goes on from, or a new one."""
        ends = (at for at, turn in enumerate(said.turns, 1) if turn["role"] == "assistant")
        end = max(ends, default=0)
        row = end and self._row(
            "SELECT conversation FROM exchanges WHERE digest = ? ORDER BY number DESC LIMIT 1",
            _digest(said.turns[:end]),
        )
        return str(row["conversation"]) if row else secrets.token_hex(8)

    def _candidate(self, candidate_id: str) -> Candidate:
        row = self._row(f"{_CANDIDATES} WHERE id = ?", candidate_id)
        if row is None:
            raise NotFound(f"there is no candidate {candidate_id!r}; GET /candidates lists them")
        return candidate_of(row)


_CANDIDATES: Final = (
    "SELECT candidates.*, conversation, turns, answer, shown, hidden "
    "FROM candidates JOIN exchanges ON exchange = number"
)


def _digest(turns: Sequence[Turn]) -> str:
    """Of what was said, instructions left out: a system prompt may tell the time."""
    said = [
        [turn["role"], turn["content"].strip()]
        for turn in turns
        if turn["role"] not in INSTRUCTIONS
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
