"""The ledger's rows as records, and records as rows. Reads and writes nothing itself."""

import json
import sqlite3
import statistics
from collections.abc import Sequence
from typing import Any

from actors.messages import JobView, TrainingSample


def sample_columns(
    sample: TrainingSample, job_id: str, position: int, now: float
) -> tuple[Any, ...]:
    """A new row of `samples`, in the order of its columns."""
    ids = json.dumps(sample.context_ids), json.dumps(sample.continuation_ids)
    known = sample.id, job_id, position, sample.source, sample.weight, *ids, sample.content_hash
    return (
        *known,
        now,
        "queued",
        json.dumps(sample.rejected_ids),
        json.dumps(sample.teacher_context_ids),
    )


def sample_of(row: sqlite3.Row) -> TrainingSample:
    """The sample that a row holds."""
    return TrainingSample(
        id=row["id"],
        context_ids=tuple(json.loads(row["context_ids"])),
        continuation_ids=tuple(json.loads(row["continuation_ids"])),
        rejected_ids=tuple(json.loads(row["rejected_ids"])),
        teacher_context_ids=tuple(json.loads(row["teacher_context_ids"])),
        weight=row["weight"],
        source=row["source"],
        content_hash=row["content_hash"],
    )


def view_of(job: sqlite3.Row, recent: Sequence[sqlite3.Row]) -> JobView:
    """A job with its most recent steps, newest first."""
    version = recent[0]["version"] if recent else None
    return JobView(
        job_id=job["id"],
        status=job["state"],
        created=job["created"],
        training_samples=job["num_samples"],
        steps=recent[0]["step_index"] + 1 if recent else 0,
        total_steps=total_steps(job),
        loss_history=tuple(step["loss"] for step in reversed(recent)),
        weights_version_before=job["version_before"],
        weights_version=version if job["version_after"] is None else job["version_after"],
        error=job["error"],
        config=json.loads(job["config"]),
        seconds_per_step=statistics.median(s["seconds"] for s in recent) if recent else None,
        trace=job["trace"],
    )


def total_steps(job: sqlite3.Row) -> int:
    """Steps of the whole job: each sample once an epoch."""
    return int(job["num_samples"] * job["epochs"])


def last_step(job: sqlite3.Row, position: int) -> int:
    """Index of the step that trains the sample at `position` in the last epoch."""
    return int(job["num_samples"] * (job["epochs"] - 1)) + position
