"""What `reverie doctor` found, one line each."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One check: what it saw, and what to do if that is not well."""

    check: str
    level: Level
    told: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(check: str, told: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", told)


def warning(check: str, told: str, remedy: str) -> Finding:
    """It runs, but not as well, or not as safely, as it could."""
    return Finding(check, "warning", told, remedy)


def error(check: str, told: str, remedy: str) -> Finding:
    """A cell would not start, or would not last."""
    return Finding(check, "error", told, remedy)
