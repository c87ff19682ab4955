"""The checkpoint actor over a small model and a scripted trainer: its clock, and its failures."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import GetTimeoutError

from actors import checkpoint, keeper
from actors.checkpoint import Checkpointer
from actors.errors import CheckpointFailed, NotFound, Unavailable
from actors.messages import CellPaths, Hold, Return
from actors.posted import CheckpointRequest, RollbackRequest
from actors.settings import JournalSettings, Settings
from actors.versions import VersionCounter
from apollo.journal.disk import DiskFull, RealDisk
from apollo.journal.recovery import open_journal
from tests.small_model import NAME, State, first_state, is_same, learned, load_public, put_model

KINDS = {2: np.float16, 4: np.float32}


class ScriptedTrainer:
    """Answers as the trainer would, and learns when it is told to."""

    def __init__(self, paths: CellPaths) -> None:
        self.state = first_state()
        self.versions = VersionCounter(paths.versions, is_writable=True)
        self.tensors = {
            name: torch.from_numpy(words.view(KINDS[words.itemsize]).copy())
            for name, words in self.state.items()
        }
        self.waits_for: list[str | None] = []
        self.restored: list[Return] = []
        self.is_gone = self.is_deaf = self.has_optimizer = False
        self.on_trial: str | None = None
        self.held = 0
        self.token = ""

    def learn(self) -> None:
        version = self.versions.weights_version + 1
        self.state = learned(self.state, version)
        for name, words in self.state.items():
            self.tensors[name].numpy()[:] = words.view(KINDS[words.itemsize])
        self.versions.weights_version = version

    def _hold(self, token: str, with_optimizer: bool) -> Hold:
        if self.is_gone:
            raise Unavailable("the trainer went away")
        self.held += 1
        version = self.versions.weights_version
        self.token = token
        return Hold(token, version, version + 1, self.has_optimizer, on_trial=self.on_trial)

    def _report(self) -> Any:
        return SimpleNamespace(on_trial=self.on_trial)

    def _release(self, token: str) -> bool:
        self.held -= token == self.token
        return True

    def _holding_forgotten(self, versions: tuple[int, ...]) -> tuple[int, ...]:
        if self.is_deaf:
            raise GetTimeoutError("no answer")
        return ()

    def _wait(self, why: str | None) -> None:
        if self.is_deaf:
            raise Unavailable("no answer")
        self.waits_for.append(why)

    def _restore(self, made: Return) -> None:
        if self.is_gone:
            raise Unavailable("the trainer went away")
        self.restored.append(made)
        self.versions.weights_version = made.weights_version

    def __getattr__(self, name: str) -> Any:
        methods: dict[str, Callable[..., Any]] = {
            "hold": self._hold,
            "report": self._report,
            "release": self._release,
            "holding_forgotten": self._holding_forgotten,
            "wait_for_room": self._wait,
            "restore": self._restore,
        }
        if name not in methods:
            raise AttributeError(name)
        return SimpleNamespace(remote=methods[name])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    put_model(RealDisk(tmp_path), first_state())
    return tmp_path


@pytest.fixture
def made(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A checkpointer that was started, without its clock."""
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(checkpoint, "KEEPING_INTERVAL_S", 0.01)
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.01)
    paths = CellPaths(str(home / "models" / NAME), str(home), str(home / "ledger.sqlite"))
    VersionCounter.create(paths.versions)
    trainer: Any = ScriptedTrainer(paths)
    settings = Settings(home=home, journal=JournalSettings(commit_every_s=1, publish_every_s=2))
    actor = Checkpointer(settings, paths, trainer)
    actor._tensors = trainer.tensors
    actor._journal = open_journal(RealDisk(home), NAME).journal
    yield SimpleNamespace(actor=actor, trainer=trainer, disk=RealDisk(home))
    actor._reason = "the test is over"


def commit(made: Any, *, publish: bool = True) -> Any:
    return made.actor.commit(CheckpointRequest(publish=publish))


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def newest(made: Any) -> State:
    """What a restart would begin with."""
    open_journal(made.disk, NAME)
    return load_public(made.disk)


def test_what_a_dream_taught_is_not_kept_before_it_has_passed(made: Any) -> None:
    made.trainer.learn()
    made.trainer.on_trial = "round-1"
    threading.Thread(target=made.actor._keep, daemon=True).start()
    made.actor._committed_at -= 60
    with pytest.raises(Unavailable, match="dream round round-1 is on trial.*DELETE /dream"):
        commit(made)
    time.sleep(0.1)
    assert made.actor._describe().generation == 0 and made.trainer.held == 0
    assert made.actor._paused is None and made.actor._reason is None
    made.trainer.on_trial = None
    wait_for(lambda: made.actor._describe().generation == 1)
    assert is_same(newest(made), made.trainer.state)


def test_what_the_work_has_freed_is_given_back_whatever_came_of_it(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(keeper, "give_back", lambda: given.append("back"))
    made.trainer.learn()
    commit(made)
    assert given == ["back"]
    made.trainer.learn()
    made.trainer.on_trial = "round-1"
    with pytest.raises(Unavailable):
        commit(made)
    made.actor.roll_back(RollbackRequest(generation=0))
    made.actor.verify()
    assert given == ["back"] * 4


def test_a_return_takes_a_dream_on_trial_with_it(made: Any) -> None:
    before = dict(made.trainer.state)
    made.trainer.learn()
    made.trainer.on_trial = "round-1"
    made.actor.roll_back(RollbackRequest(generation=0))
    assert made.actor._describe().generation == 1
    assert is_same(newest(made), before)


def test_what_is_learned_is_kept_and_published_by_the_clock(made: Any) -> None:
    made.trainer.learn()
    threading.Thread(target=made.actor._keep, daemon=True).start()
    wait_for(lambda: made.actor.report().generation == 1)
    wait_for(lambda: made.actor.report().public_generation == 1)
    assert is_same(load_public(made.disk), made.trainer.state)
    time.sleep(1.2)
    assert made.actor.report().generation == 1, "nothing was learned since"
    made.trainer.learn()
    wait_for(lambda: made.actor.report().generation == 2)
    assert made.trainer.held == 0


def test_a_full_disk_lets_the_trainer_wait_until_there_is_room(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise DiskFull("cannot write: no space left on device")

    made.trainer.learn()
    with monkeypatch.context() as patch:
        patch.setattr(RealDisk, "write", full)
        with pytest.raises(CheckpointFailed, match=r"no space left.*free some space"):
            commit(made)
        threading.Thread(target=made.actor._keep, daemon=True).start()
        wait_for(lambda: bool(made.trainer.waits_for))
        assert "no space left" in made.trainer.waits_for[0]
        assert "no space left" in made.actor.report().paused
        assert made.actor.report().reason is None and made.trainer.held == 0
    wait_for(lambda: made.trainer.waits_for[-1] is None)
    assert made.actor.report().paused is None and made.actor.report().generation == 1
    assert is_same(newest(made), made.trainer.state)


def test_a_publication_counts_where_there_is_no_room_to_thin_what_is_old(
    made: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise DiskFull("cannot write: no space left on device")

    made.trainer.learn()
    monkeypatch.setattr("apollo.journal.retention.thin", full)
    commit(made)
    assert made.actor.report().public_generation == 1 and made.actor.report().reason is None
    assert is_same(load_public(made.disk), made.trainer.state)
    assert "no space left" in caplog.text


def test_a_failed_sync_ends_the_cell_and_what_was_durable_comes_back(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.trainer.learn()
    commit(made, publish=False)
    before = made.trainer.state
    made.trainer.learn()

    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointFailed, match=r"Input/output error; the cell restarts"):
            commit(made)
    assert "the disk failed" in made.actor.report().reason
    assert is_same(newest(made), before)


def test_a_trainer_that_went_away_keeps_nothing(made: Any) -> None:
    made.trainer.learn()
    made.trainer.is_gone = True
    with pytest.raises(Unavailable):
        commit(made)
    assert made.actor.report().generation == 0


def test_a_publication_counts_although_nobody_says_what_may_be_dropped(
    made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made.trainer.learn()
    made.trainer.is_deaf = True
    kept = commit(made)
    assert made.actor.report().public_generation == kept.generation
    assert is_same(load_public(made.disk), made.trainer.state)
    assert "old generations stay until the next publication" in caplog.text


def test_a_return_is_made_public_before_the_trainer_takes_it_over(made: Any) -> None:
    for _ in range(2):
        made.trainer.learn()
        commit(made, publish=False)
    state = learned(first_state(), 1)
    back = made.actor.roll_back(RollbackRequest(generation=1))
    assert (back.generation, back.weights_version) == (3, 3)
    assert made.trainer.restored == [Return(made.trainer.token, 3)] and made.trainer.held == 0
    assert is_same(load_public(made.disk), state)
    assert [each.returns_to for each in made.actor.history()] == [1, None, None, None]
    with pytest.raises(NotFound, match="generation 9 is not kept"):
        made.actor.roll_back(RollbackRequest(generation=9))
    assert made.actor.report().reason is None


def test_a_return_that_is_cut_short_is_finished_by_a_restart(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.trainer.learn()
    commit(made)

    def gone(restored: Return) -> None:
        raise Unavailable("the trainer went away")

    monkeypatch.setattr(made.trainer, "_restore", gone)
    with pytest.raises(Unavailable, match="cut short; the cell restarts"):
        made.actor.roll_back(RollbackRequest(generation=0))
    assert made.actor.report().reason == "the return to generation 0 was cut short"
    assert made.trainer.held == 1, "it must not step on what was to be undone"
    made.trainer.learn()
    with pytest.raises(Unavailable, match="cut short"):
        commit(made)
    assert is_same(newest(made), first_state())


def test_a_full_disk_is_said_while_the_optimizers_state_is_written(
    made: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(made.actor._paths.optimizer)
    path.write_bytes(b"moments" * 1000)
    made.trainer.learn()
    whole = RealDisk.write

    def write(disk: RealDisk, path: str, offset: int, data: bytes | memoryview) -> None:
        if "optimizer" in path:
            view = memoryview(data).cast("B")
            raise DiskFull(f"no space left for {len(view)} bytes")
        whole(disk, path, offset, data)

    monkeypatch.setattr(RealDisk, "write", write)
    made.trainer.has_optimizer = True
    with pytest.raises(CheckpointFailed, match="no space left for 7000 bytes"):
        commit(made)
    assert not path.exists()


def test_what_nobody_expected_ends_the_cell_and_is_not_silent(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise MemoryError("no memory for a copy")

    monkeypatch.setattr(made.actor, "_commit", fail)
    made.trainer.learn()
    threading.Thread(target=made.actor._keep, daemon=True).start()
    wait_for(lambda: made.actor.report().reason is not None)
    assert made.actor.report().reason == "keeping ended: MemoryError: no memory for a copy"


def test_a_publication_without_room_does_not_keep_the_trainer_waiting(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RealDisk.write

    def write(disk: RealDisk, path: str, offset: int, data: bytes | memoryview) -> None:
        if path.startswith("models/") and path.endswith("b.safetensors"):
            raise DiskFull("no space left")
        whole(disk, path, offset, data)

    monkeypatch.setattr(RealDisk, "write", write)
    made.trainer.learn()
    with pytest.raises(CheckpointFailed, match="no space left"):
        commit(made)
    assert made.actor.report().generation == 1
    assert made.disk.names(f"models/.{NAME}.next") == [], "what was half written is gone"
    threading.Thread(target=made.actor._keep, daemon=True).start()
    time.sleep(3)
    assert made.trainer.waits_for == [] and made.actor.report().reason is None


def test_a_lost_word_to_go_on_is_said_again(made: Any) -> None:
    made.actor._pause("full")
    made.trainer.is_deaf = True
    with pytest.raises(Unavailable):
        made.actor._pause(None)
    made.trainer.is_deaf = False
    assert made.actor.report().paused == "full"
    made.actor._pause(None)
    assert made.trainer.waits_for == ["full", None]


def test_keeping_goes_on_when_the_trainer_could_not_be_told_to_wait(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise DiskFull("no space left")

    made.trainer.learn()
    made.trainer.is_deaf = True
    made.actor._committed_at -= 10
    with monkeypatch.context() as patch:
        patch.setattr(RealDisk, "write", full)
        keeping = threading.Thread(target=made.actor._keep, daemon=True)
        keeping.start()
        time.sleep(0.3)
        assert keeping.is_alive() and made.actor.report().reason is None
    made.trainer.is_deaf = False
    wait_for(lambda: made.actor.report().generation == 1)


def test_the_trainer_is_not_let_go_when_the_disk_fails_within_a_return(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.trainer.learn()
    commit(made)

    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointFailed, match="the cell restarts"):
        made.actor.roll_back(RollbackRequest(generation=0))
    assert made.trainer.held == 1 and "the disk failed" in made.actor.report().reason
