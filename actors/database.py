"""The SQLite file under the ledger: its schema, its durability, its transactions.

Knows tables, not what they mean: `ledger.py` does. Write-ahead log with synchronous=FULL, so that a
transaction is on disk when it returns.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Final

from actors.errors import SettingsError

BUSY_TIMEOUT_S: Final = 10.0
"""Longest wait for another process's transaction, e.g. that of a trainer that is being killed."""


class Database:
    """One file, one connection, one lock; `_row` and `_scalar` are called with the lock held."""

    NOUN: ClassVar[str]
    """What the file is, in messages."""
    SCHEMA: ClassVar[tuple[str, ...]]
    """Statements that make an empty file one of the newest format."""
    MIGRATIONS: ClassVar[Mapping[int, tuple[str, ...]]] = {}
    """What makes a file of an older format one of the next."""

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

    def _prepare(self, path: str) -> None:
        newest = 1 + len(self.MIGRATIONS)
        found = self._scalar("PRAGMA user_version")
        if found > newest:
            raise SettingsError(
                f"{path} has {self.NOUN} format {found}, and this Reverie knows {newest}; "
                "start the newer Reverie, or point `home` to another directory"
            ).about("home")
        (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise SettingsError(
                f"{path} cannot have a write-ahead log ({mode}); put `home` on a local disk"
            ).about("home")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA secure_delete = ON")
        if 0 < found < newest:
            self._db.execute("VACUUM")  # Older ones left copies of rows in unused parts of pages.
        with self._transaction():
            for statement in self.SCHEMA if found == 0 else ():
                self._db.execute(statement)
            for version in range(max(1, found), newest) if found else ():
                for statement in self.MIGRATIONS[version]:
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {newest}")

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
