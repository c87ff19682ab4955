"""The SQLite file under the ledger: its schema, its durability, its transactions.

Knows tables, not what they mean: `ledger.py` does. Write-ahead log with synchronous=FULL, so that a
transaction is on disk when it returns.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from actors.errors import SettingsError

BUSY_TIMEOUT_S: Final = 10.0
"""Longest wait for another process's transaction, e.g. that of a trainer that is being killed."""

_SCHEMA_VERSION: Final = 5
_SCHEMA: Final = (
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        created REAL NOT NULL,
        state TEXT NOT NULL,
        config TEXT NOT NULL,
        num_samples INTEGER NOT NULL,
        epochs INTEGER NOT NULL,
        version_before INTEGER,
        version_after INTEGER,
        error TEXT,
        cancel_requested INTEGER NOT NULL DEFAULT 0,
        furthest_step INTEGER NOT NULL DEFAULT 0,
        num_ends INTEGER NOT NULL DEFAULT 0,
        round_id TEXT,
        has_passed INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE samples (
        id TEXT PRIMARY KEY,
        job_id TEXT NOT NULL REFERENCES jobs (id),
        position INTEGER NOT NULL,
        source TEXT,
        weight REAL NOT NULL,
        context_ids TEXT NOT NULL,
        continuation_ids TEXT NOT NULL,
        content_hash TEXT NOT NULL,
        created REAL NOT NULL,
        state TEXT NOT NULL,
        rejected_ids TEXT NOT NULL DEFAULT '[]',
        teacher_context_ids TEXT NOT NULL DEFAULT '[]',
        UNIQUE (job_id, position))""",
    # UNIQUE: a version names one state of the weights, so it is the result of one step.
    """CREATE TABLE steps (
        job_id TEXT NOT NULL REFERENCES jobs (id),
        step_index INTEGER NOT NULL,
        sample_id TEXT NOT NULL REFERENCES samples (id),
        version INTEGER NOT NULL UNIQUE,
        loss REAL NOT NULL,
        seconds REAL NOT NULL,
        PRIMARY KEY (job_id, step_index)) WITHOUT ROWID""",
    "CREATE TABLE cell (key TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    "CREATE INDEX jobs_by_state ON jobs (state)",
    "CREATE INDEX samples_by_state ON samples (state)",
    "INSERT INTO cell VALUES ('version_high_water', 0)",
    "INSERT INTO cell VALUES ('undone_until', 0)",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)

_MIGRATIONS: Final = {
    1: (
        "ALTER TABLE samples ADD COLUMN rejected_ids TEXT NOT NULL DEFAULT '[]'",
        "ALTER TABLE samples ADD COLUMN teacher_context_ids TEXT NOT NULL DEFAULT '[]'",
        "PRAGMA user_version = 2",
    ),
    2: (
        "ALTER TABLE jobs ADD COLUMN furthest_step INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN num_ends INTEGER NOT NULL DEFAULT 0",
        "PRAGMA user_version = 3",
    ),
    3: (
        "INSERT INTO cell VALUES ('undone_until', 0)",
        "PRAGMA user_version = 4",
    ),
    4: (
        "ALTER TABLE jobs ADD COLUMN round_id TEXT",
        "ALTER TABLE jobs ADD COLUMN has_passed INTEGER NOT NULL DEFAULT 0",
        "PRAGMA user_version = 5",
    ),
}
"""What makes a ledger of an older format one of the next."""


class Database:
    """One file, one connection, one lock; `_row` and `_scalar` are called with the lock held."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file, or make it, readable by this user only; its directory must exist.

        Raises SettingsError for a file of a newer Reverie, which is left as it is.
        """
        # O_EXCL: closing a descriptor of a database that this process has open drops its locks.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        os.chmod(path, 0o600)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        self._db.row_factory = sqlite3.Row
        try:
            self._prepare(os.fspath(path))
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file; every later call raises sqlite3.ProgrammingError."""
        with self._lock:
            self._db.close()

    def claim(self, adopted: float) -> None:
        """Tie this ledger to the adoption (its time) that its steps build on.

        Raises SettingsError where it belongs to another one: to teach its samples to a model that
        was adopted anew would bring back what somebody removed.
        """
        with self._transaction() as db:
            known = self._row("SELECT value FROM cell WHERE key = 'adopted'")
            if known is None:
                db.execute("INSERT INTO cell VALUES ('adopted', ?)", (adopted,))
            elif known["value"] != adopted:
                raise SettingsError(
                    "the model was adopted anew, but its ledger is that of the one before; move "
                    "REVERIE_HOME/state/NAME away to start afresh"
                )

    def _prepare(self, path: str) -> None:
        found = self._scalar("PRAGMA user_version")
        if found > _SCHEMA_VERSION:
            raise SettingsError(
                f"{path} has ledger format {found}, and this Reverie knows {_SCHEMA_VERSION}; "
                "start the newer Reverie, or point `home` to another directory"
            ).about("home")
        (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise SettingsError(
                f"{path} cannot have a write-ahead log ({mode}); put `home` on a local disk"
            ).about("home")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction():
            for statement in _SCHEMA if found == 0 else ():
                self._db.execute(statement)
            for version in range(max(1, found), _SCHEMA_VERSION) if found else ():
                for statement in _MIGRATIONS[version]:
                    self._db.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have rolled back already
                    self._db.execute("ROLLBACK")
                raise

    def _row(self, sql: str, *values: Any) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._db.execute(sql, values).fetchone()
        return row

    def _scalar(self, sql: str, *values: Any) -> int:
        return int(self._db.execute(sql, values).fetchone()[0])
