"""Records as the routes show them: plain JSON, without what only concerns this machine."""

import os
from dataclasses import asdict, is_dataclass
from typing import Any, Final

from actors.messages import CellReport, JobView
from actors.past import GenerationDetail
from actors.versions import VersionCounter
from door.exchanges import ExchangeLog

_ONLY_METRICS: Final = {
    "trainer": ("step_seconds",),
    "checkpoint": ("commit_seconds", "stall_seconds"),
}
"""Whole distributions: for programs that draw them."""


def as_json(record: Any) -> dict[str, Any]:
    """A dataclass as a JSON object."""
    assert is_dataclass(record) and not isinstance(record, type)
    return asdict(record)


def job_as_json(view: JobView) -> dict[str, Any]:
    """A job; absent facts are null."""
    return as_json(view)


def generation_as_json(detail: GenerationDetail) -> dict[str, Any]:
    """A generation as the list of them has it, with what was learned in it."""
    shown = as_json(detail)
    shown["drift"]["share_changed"] = detail.drift.num_changed / detail.drift.num_elements
    listed: dict[str, Any] = shown.pop("generation")
    return listed | shown


def status_as_json(
    report: CellReport | None, versions: VersionCounter | None, ongoing: int, log: ExchangeLog
) -> dict[str, Any]:
    """The cell as `/status` shows it; paths stay inside."""
    if report is None:
        return {"state": "unreachable", "reason": "the cell does not answer"}
    shown = as_json(report)
    paths = shown.pop("paths")
    for role, facts in _ONLY_METRICS.items():
        for name in facts if shown[role] else ():
            del shown[role][name]
    shown["cell"] = {"pid": shown.pop("pid")}
    shown["model"] = None if paths is None else paths["model_dir"].rsplit("/", 1)[-1]
    shown["weights_version"] = None if versions is None else versions.weights_version
    shown["epoch"] = None if versions is None else versions.epoch
    shown["ingress"] = {
        "pid": os.getpid(),
        "ongoing_requests": ongoing,
        "exchanges": {
            "kept": log.kept,
            "passed_over": log.passed_over,
            "dropped": log.dropped,
        },
    }
    return shown
