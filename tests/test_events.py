"""The event log, and the file under it: whole lines of many writers, bounded, never in the way."""

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from actors import line_file
from actors.events import NAME, Events
from actors.job_log import LINE_INTERVAL_S, JobLog
from actors.line_file import LineFile
from actors.logs import bound, bound_ids
from actors.messages import QueuedJob
from actors.posted import TrainConfig
from tests.small_cell import adopt, boot

NUM_WRITERS, NUM_LINES = 4, 200


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{NAME}.jsonl").read_text().splitlines()]


def _write_many(folder: Path, writer: int) -> None:
    file = LineFile(folder, NAME, 4000, 10_000)
    for number in range(NUM_LINES):
        file.add({"writer": writer, "number": number})


def test_no_line_of_many_processes_is_lost_or_torn_also_where_files_are_put_aside(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_many, args=(tmp_path, writer))
        for writer in range(NUM_WRITERS)
    ]
    for each in writers:
        each.start()
    for each in writers:
        each.join(60)
        assert each.exitcode == 0
    files = sorted(tmp_path.glob(f"{NAME}-*.jsonl"))
    assert len(files) > 5
    told = [json.loads(x) for path in [*files, tmp_path / f"{NAME}.jsonl"] if path.exists()
            for x in path.read_text().splitlines()]  # fmt: skip
    for writer in range(NUM_WRITERS):
        numbers = [line["number"] for line in told if line["writer"] == writer]
        assert numbers == list(range(NUM_LINES))


def test_a_file_that_stays_locked_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_file, "LOCK_TIMEOUT_S", 0.05)
    file = LineFile(tmp_path, NAME, 4000, 2)
    held = file._open()
    with pytest.raises(OSError, match="another process keeps it locked"):
        file.add({"number": 1})
    os.close(held)
    file.add({"number": 2})
    assert [line["number"] for line in lines(tmp_path)] == [2]


def test_an_event_has_its_role_and_ids_and_no_empty_fact(tmp_path: Path) -> None:
    events = Events(tmp_path, "trainer")
    with bound(job="job-1", trace="t1"):
        events.note("steps", version=3, error=None)
    events.note("boot", boot=1)
    steps, boot_ = lines(tmp_path)
    assert steps.pop("time") <= boot_.pop("time")
    assert steps == {
        "role": "trainer", "event": "steps", "job": "job-1", "trace": "t1", "version": 3
    }  # fmt: skip
    assert boot_ == {"role": "trainer", "event": "boot", "boot": 1}
    assert (tmp_path / f"{NAME}.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_loses_events_says_so_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    events = Events(tmp_path, "cell")
    with monkeypatch.context() as patched:
        patched.setattr(LineFile, "add", full)
        for _ in range(3):
            events.note("boot")
    assert [each.getMessage() for each in caplog.records if each.levelname == "WARNING"] == [
        "events are lost: No space left on device"
    ]
    events.note("boot")
    assert len(lines(tmp_path)) == 1


def test_steps_are_told_together_and_none_is_left_out(tmp_path: Path) -> None:
    now = [0.0]
    log = JobLog(Events(tmp_path, "trainer"), lambda: now[0])
    log.begin(QueuedJob("job-1", (), TrainConfig(), 0, trace="t1"), 10)
    for number in range(1, 8):
        now[0] += LINE_INTERVAL_S / 2
        log.step(number, 10 + number, 1.0 / number, 0.5, 6)
    log.end("done", 17)
    assert not bound_ids()
    begun, *steps, ended = lines(tmp_path)
    assert (begun["event"], ended["event"], ended["state"]) == ("job_begun", "job_ended", "done")
    assert [(each["first_step"], each["last_step"]) for each in steps] == [
        (1, 2), (3, 4), (5, 6), (7, 7)
    ]  # fmt: skip
    assert sum(each["tokens"] for each in steps) == 42 and steps[-1]["version"] == 17
    assert {(each["job"], each["trace"]) for each in lines(tmp_path)} == {("job-1", "t1")}


def test_a_boot_tells_what_was_learned_kept_and_taken_back(tmp_path: Path) -> None:
    home = tmp_path / "home"
    adopt(home)
    with boot(home, tmp_path / "run") as cell:
        cell.teach("a", "b", epochs=2)
        cell.settle()
        kept = cell.commit(publish=True)
        keeping = cell.checkpoint.report()
        cell.teach("c")
        cell.settle()
        cell.forget("c")
        report = cell.trainer.report()
    told = lines(Path(cell.paths.ledger).parent)
    names = [each["event"] for each in told]
    assert names[:3] == ["job_begun", "steps", "job_ended"]
    assert {"commit", "publication", "forgotten"} <= set(names)
    commit = next(each for each in told if each["event"] == "commit")
    assert (commit["generation"], commit["version"]) == (kept.generation, 4)
    assert report.samples["trained"] == 2 and sum(report.step_seconds.counts) == 5
    assert report.learned_tokens > 0
    assert sum(keeping.commit_seconds.counts) == 1 and keeping.commit_bytes == kept.size_bytes
    assert keeping.changed_share is not None and 0.5 < keeping.changed_share <= 1
