"""Where a cell that `reverie up` runs says how it is found: REVERIE_HOME/run/PORT.json.

    up writes it --> down, logs, submit read it

A record outlives its cell, with what became of the last checkpoint; whether the cell lives is asked
of the system, by process id and start time. It holds addresses and no secrets (mode 0600).
"""

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import psutil

START_TOLERANCE_S = 2.0
"""Start times of one process, read twice, may differ by the clock's adjustment."""


@dataclass(frozen=True)
class CellRecord:
    """One run of `reverie up`."""

    port: int
    host: str
    model: str
    pid: int
    begun: float
    """When the process began, as the system knows it."""
    ray_address: str = ""
    dashboard: str = ""
    """Of Ray: where jobs are submitted. Empty if there is none."""
    session_dir: str = ""
    """Where Ray keeps this cluster's logs."""
    auth_mode: str = "disabled"
    """Ray's own: `token` if its ports ask for the token in ~/.ray/auth_token."""
    saved: str | None = None
    """What became of the last checkpoint, once it has stopped."""

    def process(self) -> psutil.Process | None:
        """The process, if it still runs."""
        try:
            found = psutil.Process(self.pid)
            if found.status() == psutil.STATUS_ZOMBIE:
                return None
            is_same = abs(found.create_time() - self.begun) < START_TOLERANCE_S
        except psutil.NoSuchProcess:
            return None
        return found if is_same else None


def write(home: Path, record: CellRecord) -> None:
    """Replace the record of its port."""
    path = _path(home, record.port)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(record), file, indent=1)
    draft.rename(path)


def read(home: Path, port: int) -> CellRecord | None:
    """The newest record of the port; None if there is none that can be read."""
    try:
        stored = json.loads(_path(home, port).read_text())
        known = {each.name for each in fields(CellRecord)}
        return CellRecord(**{key: value for key, value in stored.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def ports(home: Path) -> list[int]:
    """Those that have a record."""
    return [int(path.stem) for path in (home / "run").glob("*.json") if path.stem.isdigit()]


def end(home: Path, record: CellRecord, saved: str) -> None:
    """Note what became of the last checkpoint."""
    write(home, replace(record, saved=saved))


def mine(port: int, host: str, model: str, session: dict[str, str]) -> CellRecord:
    """The record of this process."""
    return CellRecord(port, host, model, os.getpid(), psutil.Process().create_time(), **session)


def _path(home: Path, port: int) -> Path:
    return home / "run" / f"{port}.json"
