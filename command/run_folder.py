"""One submitted run of an experiment: REVERIE_HOME/runs/ID, with settings, versions, results.

run.json     what was asked, of which versions, and the job's name in Ray
log.txt      what it printed
exit_code    written when it ends, so that its end is known without Ray
all others   its results: whatever it wrote into its working directory
"""

import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from actors.errors import SettingsError
from command.version_matrix import MATRIX, installed

RECORD: Final = "run.json"
EXIT_CODE: Final = "exit_code"
LOG: Final = "log.txt"
GIT_TIMEOUT_S: Final = 10

State = Literal["running", "done", "failed", "stopped", "lost"]


@dataclass(frozen=True)
class Run:
    """What was asked."""

    id: str
    experiment: str
    settings: dict[str, str]
    entrypoint: str
    dashboard: str
    created: float
    versions: dict[str, str] = field(default_factory=dict)
    is_stopped: bool = False
    """Whether somebody has asked it to end."""

    def path(self, home: Path) -> Path:
        return home / "runs" / self.id

    def save(self, home: Path) -> None:
        draft = self.path(home) / f".{RECORD}"
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n")
        draft.rename(self.path(home) / RECORD)

    def stopped(self) -> "Run":
        return replace(self, is_stopped=True)

    def ended(self, home: Path) -> tuple[State, float] | None:
        """How and when it ended, if its own process could say so."""
        path = self.path(home) / EXIT_CODE
        try:
            code, at = path.read_text().strip(), path.stat().st_mtime
        except OSError:
            return None
        if code == "0":
            return "done", at
        return ("stopped" if self.is_stopped else "failed"), at

    def results(self, home: Path) -> dict[str, int]:
        """Size in bytes of every file that it has made."""
        place = self.path(home)
        own = {RECORD, f".{RECORD}", EXIT_CODE, LOG}
        found = {str(each.relative_to(place)): each for each in place.rglob("*") if each.is_file()}
        return {
            name: each.stat().st_size for name, each in sorted(found.items()) if name not in own
        }


def create(home: Path, experiment: str) -> tuple[str, Path]:
    """A new id and its empty folder."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 1000):
        name = f"{experiment}-{stamp}" + (f"-{number}" if number > 1 else "")
        place = home / "runs" / name
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            continue
        return name, place
    raise SettingsError(f"{home}/runs: a thousand runs of {experiment} in one second")


def find(home: Path, name: str) -> Run:
    """Raises SettingsError for an unknown one."""
    path = home / "runs" / name / RECORD
    try:
        return Run(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        known = ", ".join(each.id for each in every(home)[:5]) or "none yet"
        raise SettingsError(f"{name}: there is no such run; the newest are {known}").about(
            "run"
        ) from None


def every(home: Path) -> list[Run]:
    """All of them, the newest first; a folder without a record is passed over."""
    found = []
    for path in (home / "runs").glob(f"*/{RECORD}"):
        try:
            found.append(Run(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda each: each.created, reverse=True)


def versions(root: Path) -> dict[str, str]:
    """Of everything that a result may depend on."""
    found = {each.name: installed(each) or "none" for each in MATRIX}
    return found | {"python": platform.python_version(), "commit": _commit(root)}


def _commit(root: Path) -> str:
    """The checkout's commit, with a mark if it was changed since."""

    def git(*words: str) -> str:
        done: Any = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
        return str(done.stdout).strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            " and changes" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
