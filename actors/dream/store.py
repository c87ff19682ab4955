"""What the dream loop remembers: memories, behaviours, rounds, their items, the base's record.

Conversations and candidates are in `conversations.py`.

One SQLite file beside the ledger, one writing process. A round and its items are JSON in a column:
they are read whole, and what is asked by is a column of its own.
"""

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final

from actors.dream.behaviour import Behaviour
from actors.dream.conversations import TABLES, Conversations
from actors.dream.curriculum import Progress
from actors.dream.records import ENDED, Item, ItemKind, Round
from actors.errors import Conflict, NotFound

MAX_MEMORIES: Final = 100_000
MAX_BEHAVIOURS: Final = 1000
DAY_S: Final = 24 * 3600
_SCHEMA: Final = (
    """CREATE TABLE memories (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        text TEXT NOT NULL,
        tags TEXT NOT NULL,
        created REAL NOT NULL)""",
    """CREATE TABLE behaviours (
        name TEXT PRIMARY KEY,
        behaviour TEXT NOT NULL,
        progress TEXT NOT NULL)""",
    """CREATE TABLE rounds (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        behaviour TEXT NOT NULL,
        created REAL NOT NULL,
        is_ended INTEGER NOT NULL,
        round TEXT NOT NULL)""",
    """CREATE TABLE items (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        round_id TEXT NOT NULL,
        behaviour TEXT NOT NULL,
        kind TEXT NOT NULL,
        is_kept INTEGER NOT NULL,
        is_marked INTEGER NOT NULL DEFAULT 0,
        item TEXT NOT NULL)""",
    "CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE INDEX items_by_round ON items (round_id)",
    "CREATE INDEX items_by_behaviour ON items (behaviour, kind)",
)


@dataclass(frozen=True)
class Memory:
    """One text that scenarios may be made from."""

    id: str
    text: str
    tags: tuple[str, ...]
    created: float


@dataclass(frozen=True)
class Usage:
    """What dreams have taken in the last 24 hours."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0


_LEARNED: Final = (
    "is_kept AND NOT is_marked AND round_id IN "
    "(SELECT id FROM rounds WHERE json_extract(round, '$.state') = 'passed')"
)
"""Of an item: a round that passed has taught it."""


class DreamStore(Conversations):
    """Every method that changes something is one transaction, on disk when it returns."""

    NOUN = "dream"
    SCHEMA = _SCHEMA + TABLES
    MIGRATIONS: ClassVar[Mapping[int, tuple[str, ...]]] = {1: TABLES}

    # Memories.

    def add_memories(self, memories: Sequence[Memory]) -> list[Memory]:
        """All of them or none, as they are kept: one that is there already stays as it is.

        Raises Conflict for a known id with another text, or when there would be too many.
        """
        with self._transaction():
            kept = [self._add_memory(each) for each in memories]
            there = self._scalar("SELECT COUNT(*) FROM memories")
            if there > MAX_MEMORIES:
                raise Conflict(
                    f"there would be {there} memories and the bound is {MAX_MEMORIES}; nothing of "
                    "this request was kept: delete some first"
                )
            return kept

    def _add_memory(self, memory: Memory) -> Memory:
        row = self._row("SELECT * FROM memories WHERE id = ?", memory.id)
        if row is None:
            self._db.execute(
                "INSERT INTO memories (id, text, tags, created) VALUES (?, ?, ?, ?)",
                (memory.id, memory.text, json.dumps(memory.tags), memory.created),
            )
            return memory
        known = _memory_of(row)
        if (known.text, known.tags) != (memory.text, memory.tags):
            raise Conflict(
                f"the id {memory.id!r} was used before with another text or other tags; nothing of "
                "this request was kept: give the new one a new id"
            ).about("id")
        return known

    def memories(self, limit: int = MAX_MEMORIES) -> list[Memory]:
        """Newest first."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM memories ORDER BY seq DESC LIMIT ?", (limit,))
            return [_memory_of(row) for row in rows]

    def delete_memory(self, memory_id: str) -> None:
        """Raises NotFound."""
        with self._transaction() as db:
            if not db.execute("DELETE FROM memories WHERE id = ?", (memory_id,)).rowcount:
                raise NotFound(f"there is no memory {memory_id!r}; GET /memories lists them")

    # Behaviours.

    def put_behaviour(self, behaviour: Behaviour) -> None:
        """Add one, or replace it: it then learns from the start."""
        progress = Progress(behaviour.name, behaviour.target)
        with self._transaction() as db:
            known = self._scalar("SELECT COUNT(*) FROM behaviours WHERE name != ?", behaviour.name)
            if known >= MAX_BEHAVIOURS:
                raise Conflict(f"{known} behaviours are there; delete one first")
            db.execute(
                "INSERT OR REPLACE INTO behaviours VALUES (?, ?, ?)",
                (behaviour.name, behaviour.model_dump_json(), json.dumps(asdict(progress))),
            )
            db.execute(
                "DELETE FROM items WHERE kind = 'held_out' AND behaviour = ?", (behaviour.name,)
            )

    def behaviour(self, name: str) -> tuple[Behaviour, Progress]:
        """Raises NotFound."""
        with self._lock:
            row = self._row("SELECT * FROM behaviours WHERE name = ?", name)
        if row is None:
            raise NotFound(f"there is no behaviour {name!r}; GET /behaviours lists them")
        return _behaviour_of(row)

    def behaviours(self) -> list[tuple[Behaviour, Progress]]:
        with self._lock:
            rows = self._db.execute("SELECT * FROM behaviours ORDER BY name").fetchall()
        return [_behaviour_of(row) for row in rows]

    def set_progress(self, progress: Progress) -> None:
        """A behaviour that was deleted meanwhile stays so."""
        with self._transaction() as db:
            db.execute(
                "UPDATE behaviours SET progress = ? WHERE name = ?",
                (json.dumps(asdict(progress)), progress.name),
            )

    def delete_behaviour(self, name: str) -> None:
        """Raises NotFound. What was learned of it stays learned."""
        with self._transaction() as db:
            if not db.execute("DELETE FROM behaviours WHERE name = ?", (name,)).rowcount:
                raise NotFound(f"there is no behaviour {name!r}; GET /behaviours lists them")

    # Rounds and items.

    def begin_round(self, behaviour: str, temperature: float) -> Round:
        """A new round; there must be no open one."""
        with self._transaction() as db:
            is_open = self._scalar("SELECT COUNT(*) FROM rounds WHERE NOT is_ended")
            assert not is_open, "one round at a time"
            number = 1 + self._scalar("SELECT COALESCE(MAX(number), 0) FROM rounds")
            made = Round(f"round-{number}", number, behaviour, time.time(), temperature=temperature)
            db.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, 0, ?)",
                (number, made.id, behaviour, made.created, json.dumps(made.as_json())),
            )
            return made

    def save_round(self, changed: Round) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE rounds SET is_ended = ?, round = ? WHERE id = ?",
                (changed.state in ENDED, json.dumps(changed.as_json()), changed.id),
            )

    def open_round(self) -> Round | None:
        """The one that has not ended."""
        with self._lock:
            row = self._row("SELECT round FROM rounds WHERE NOT is_ended")
        return None if row is None else Round.from_json(json.loads(row["round"]))

    def round(self, round_id: str) -> Round:
        """Raises NotFound."""
        with self._lock:
            row = self._row("SELECT round FROM rounds WHERE id = ?", round_id)
        if row is None:
            raise NotFound(f"there is no round {round_id!r}; GET /dream/rounds lists them")
        return Round.from_json(json.loads(row["round"]))

    def rounds(self, limit: int) -> list[Round]:
        """Newest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT round FROM rounds ORDER BY number DESC LIMIT ?", (limit,)
            ).fetchall()
        return [Round.from_json(json.loads(row["round"])) for row in rows]

    def usage(self, now: float) -> Usage:
        """Of the rounds that began in the last 24 hours."""
        with self._lock:
            rows = self._db.execute(
                "SELECT round FROM rounds WHERE created > ?", (now - DAY_S,)
            ).fetchall()
        rounds = [Round.from_json(json.loads(row["round"])) for row in rows]
        return Usage(
            sum(each.tokens for each in rounds),
            sum(each.num_steps for each in rounds),
            sum(sum(each.seconds.values()) for each in rounds),
        )

    def save_items(self, items: Sequence[Item]) -> None:
        """Idempotent by id: what is there stays."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO items (id, round_id, behaviour, kind, is_kept, item) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (
                        each.id,
                        each.round_id,
                        each.behaviour,
                        each.kind,
                        each.is_kept,
                        json.dumps(asdict(each)),
                    )
                    for each in items
                ],
            )

    def drop_items(self, items: Sequence[Item]) -> None:
        """These were kept and shall not be learned after all; each has its reason."""
        with self._transaction() as db:
            db.executemany(
                "UPDATE items SET is_kept = 0, item = ? WHERE id = ?",
                [(json.dumps(asdict(each)), each.id) for each in items],
            )

    def mark_items(self, round_id: str) -> None:
        """The gate has refused what these taught: they are not rehearsed either."""
        with self._transaction() as db:
            db.execute("UPDATE items SET is_marked = 1 WHERE round_id = ?", (round_id,))

    def items(self, round_id: str) -> list[Item]:
        """All items of a round, as they came."""
        return self._items("round_id = ? AND kind != 'held_out'", round_id)

    def held_out(self, behaviour: str) -> list[Item]:
        """Situations that test a behaviour; none of them is ever learned."""
        return self._items("behaviour = ? AND kind = 'held_out'", behaviour)

    def learned(self, besides: str, kind: ItemKind = "new") -> list[Item]:
        """What rounds that passed have taught of other behaviours than `besides`."""
        return self._items(f"behaviour != ? AND kind = ? AND {_LEARNED}", besides, kind)

    def learned_behaviours(self) -> set[str]:
        """Those that a round that passed has taught something of."""
        with self._lock:
            rows = self._db.execute(
                f"SELECT DISTINCT behaviour FROM items WHERE kind = 'new' AND {_LEARNED}"
            ).fetchall()
        return {str(row["behaviour"]) for row in rows}

    def _items(self, where: str, *values: Any) -> list[Item]:
        with self._lock:
            rows = self._db.execute(
                f"SELECT item FROM items WHERE {where} ORDER BY seq", values
            ).fetchall()
        return [_item_of(json.loads(row["item"])) for row in rows]

    # Notes: whole values by name.

    def note(self, key: str) -> Any:
        """What was written under `key`; None if nothing was."""
        with self._lock:
            row = self._row("SELECT value FROM notes WHERE key = ?", key)
        return None if row is None else json.loads(row["value"])

    def write_note(self, key: str, value: Any) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (key, json.dumps(value)))


def _memory_of(row: sqlite3.Row) -> Memory:
    return Memory(row["id"], row["text"], tuple(json.loads(row["tags"])), row["created"])


def _behaviour_of(row: sqlite3.Row) -> tuple[Behaviour, Progress]:
    return Behaviour.model_validate_json(row["behaviour"]), Progress(**json.loads(row["progress"]))


def _item_of(row: dict[str, Any]) -> Item:
    return Item(**{**row, "memories": tuple(row["memories"])})
