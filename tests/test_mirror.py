"""A mirror by the real rsync: whole at every moment, small when little is new, and back again."""

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from actors.errors import Conflict, ReverieError, SettingsError, Unavailable
from actors.ledger import Ledger
from actors.messages import TrainingSample
from actors.mirror import INDEX, Index, mirror, restore
from actors.posted import TrainConfig
from apollo.journal.disk import RealDisk
from apollo.journal.recovery import open_journal
from apollo.journal.retention import Retention, thin
from tests.small_model import (
    CHUNK_WORDS,
    NAME,
    State,
    first_state,
    is_same,
    learned,
    load_public,
    put_model,
)

pytestmark = pytest.mark.skipif(shutil.which("rsync") is None, reason="mirrors need rsync")

DAY_S = 24 * 3600


class Home:
    """A home whose model learns; no cell runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.disk, self.state = path, RealDisk(path), first_state()
        path.mkdir()
        put_model(self.disk, self.state)
        self.journal = open_journal(self.disk, NAME, chunk_words=CHUNK_WORDS).journal
        self.ledger = Ledger(path / "state" / NAME / "ledger.sqlite")
        self.version = 0

    def learn(self, *, publish: bool = False) -> None:
        self.version += 1
        sample = TrainingSample(f"s{self.version}", (1,), (2, 3), content_hash="h")
        job_id = self.ledger.accept([sample], TrainConfig(), 100).job_id
        self.ledger.start_job(job_id, self.version - 1)
        self.ledger.record_step(job_id, 0, sample.id, self.version, 1.0, 0.1)
        self.ledger.finish_job(job_id, "done", self.version)
        self.state = learned(self.state, self.version)
        self.journal.commit(self.state, self.version, b"moments", self.version)
        if publish:
            self.journal.publish()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


def run(home: Home, place: Path | str) -> Index:
    return mirror(home.path, NAME, str(place), lambda text: None)


def bring_back(place: Path | str, path: Path) -> tuple[State, Ledger]:
    """What a boot from the restored home begins with."""
    restore(path, str(place), lambda text: None)
    disk = RealDisk(path)
    open_journal(disk, NAME, chunk_words=CHUNK_WORDS)
    return load_public(disk), Ledger(path / "state" / NAME / "ledger.sqlite")


def is_whole(place: Path, path: Path, states: list[State]) -> bool:
    found, ledger = bring_back(place, path)
    ledger.close()
    shutil.rmtree(path)
    return any(is_same(found, state) for state in states)


def test_what_was_mirrored_comes_back_with_optimizer_and_ledger(
    home: Home, place: Path, tmp_path: Path
) -> None:
    for _ in range(3):
        home.learn()
    made = run(home, place)
    assert (made.generation, made.weights_version, made.anchor_generation) == (3, 3, 0)
    found, ledger = bring_back(place, tmp_path / "other")
    assert is_same(found, home.state)
    assert ledger.recover(3) == 3 and ledger.counts()["trained"] == 3
    ledger.close()
    journal = open_journal(RealDisk(tmp_path / "other"), NAME, chunk_words=CHUNK_WORDS).journal
    assert journal.optimizer(journal.newest) == b"moments"
    assert [each.generation for each in journal.chain.generations] == [0, 1, 2, 3]


def test_only_this_user_may_read_a_mirror(home: Home, place: Path) -> None:
    home.learn()
    run(home, place)
    for folder, _, names in os.walk(place):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for name in names:
            assert stat.S_IMODE(os.stat(Path(folder) / name).st_mode) == 0o600


def test_a_second_run_sends_only_what_is_new_and_keeps_the_anchor(home: Home, place: Path) -> None:
    home.learn()
    run(home, place)
    before = {path: path.stat().st_ino for path in place.rglob("*") if path.is_file()}
    home.learn(publish=True)
    made = run(home, place)
    assert made.anchor_generation == 0, "it is of use as long as its generation is kept"
    after = {path: path.stat().st_ino for path in place.rglob("*") if path.is_file()}
    same = {path.name for path in after if before.get(path) == after[path]}
    new = {path.name for path in after if path not in before}
    assert {"a.safetensors", "base-00000000.rvj", "00000000-00000001.rvj"} <= same
    assert {"00000001-00000002.rvj"} < new and not any(
        "safetensors" in n and "opt" not in n for n in new
    )


def test_a_run_with_nothing_new_changes_no_file_but_the_index(home: Home, place: Path) -> None:
    home.learn()
    run(home, place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*.rvj")}
    files = run(home, place).files
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*.rvj")}
    assert {path.name for path in place.rglob("*") if path.is_file()} == {
        name.split("/")[-1] for name in (*files, INDEX)
    }


def test_generations_that_were_added_up_leave_the_mirror_too(
    home: Home, place: Path, tmp_path: Path
) -> None:
    for _ in range(4):
        home.learn()
    run(home, place)
    assert (place / "journal" / "00000001-00000002.rvj").exists()
    home.journal.publish()
    thin(home.journal, time.time() + 3 * DAY_S, Retention(0, 0, None))
    made = run(home, place)
    names = {path.name for path in (place / "journal").iterdir()}
    assert names == {name.split("/")[-1] for name in made.files if name.startswith("journal/")}
    assert is_whole(place, tmp_path / "other", [home.state])


def test_an_anchor_whose_generation_is_gone_is_replaced(
    home: Home, place: Path, tmp_path: Path
) -> None:
    home.learn(publish=True)
    home.learn(publish=True)
    assert run(home, place).anchor_generation == 2
    for _ in range(3):  # The hidden directory keeps the generation before the public one.
        home.learn(publish=True)
    thin(home.journal, time.time() + 30 * DAY_S, Retention(0, 0, DAY_S))
    assert home.journal.chain.find(2) is None
    assert run(home, place).anchor_generation == 5
    assert [p.name for p in place.iterdir() if p.name.startswith("anchor")] == ["anchor-00000005"]
    assert is_whole(place, tmp_path / "other", [home.state])


def test_a_ledger_that_is_newer_than_the_weights_queues_the_rest_again(
    home: Home, place: Path, tmp_path: Path
) -> None:
    home.learn()
    sample = TrainingSample("late", (1,), (2, 3), content_hash="h")
    job_id = home.ledger.accept([sample], TrainConfig(), 100).job_id
    home.ledger.start_job(job_id, 1)
    home.ledger.record_step(job_id, 0, "late", 2, 1.0, 0.1)
    home.ledger.finish_job(job_id, "done", 2)
    run(home, place)
    _, ledger = bring_back(place, tmp_path / "other")
    ledger.recover(1)
    assert ledger.sample_state("late")[0] == "queued" and ledger.sample_state("s1")[0] == "trained"
    ledger.close()


CHILD = """
import sys
from pathlib import Path
from actors.mirror import mirror
mirror(Path(sys.argv[1]), sys.argv[2], sys.argv[3], lambda text: print(text, flush=True))
"""


def test_a_run_that_is_killed_leaves_the_mirror_as_it_was_and_the_next_finishes(
    home: Home, place: Path, tmp_path: Path
) -> None:
    states = [home.state]
    home.learn()
    run(home, place)
    states = [home.state]
    num_cut = 0
    for number in range(12):
        home.learn(publish=number % 3 == 0)
        states.append(home.state)
        command = [sys.executable, "-c", CHILD, str(home.path), NAME, str(place)]
        child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()  # It has begun to ship.
        time.sleep(0.03 * number)
        num_cut += child.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert is_whole(place, tmp_path / "other", states)
    assert num_cut >= 6, "too few runs were cut short to say anything"
    run(home, place)
    assert is_whole(place, tmp_path / "other", [home.state])


@pytest.mark.parametrize("victim", ["journal/*.rvj", "anchor-*/a.safetensors", "databases/*"])
def test_a_damaged_file_is_found_and_sent_again(
    home: Home, place: Path, tmp_path: Path, victim: str
) -> None:
    home.learn()
    run(home, place)
    path = sorted(place.glob(victim))[0]
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ReverieError, match="is damaged or missing there; nothing was restored"):
        restore(tmp_path / "other", str(place), lambda text: None)
    for _ in range(2):
        try:
            run(home, place)
        except Unavailable as error:
            assert "run it again" in str(error)
    if "anchor" not in victim:
        assert is_whole(place, tmp_path / "again", [home.state])


def test_without_its_check_a_damaged_mirror_would_be_restored(
    home: Home, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.learn()
    run(home, place)
    path = sorted(place.glob("anchor-*/a.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    monkeypatch.setattr("actors.mirror._is_as_sent", lambda *_: True)
    restore(tmp_path / "other", str(place), lambda text: None)
    run(home, place)
    assert path.read_bytes().endswith(b"!"), "nor would the damage be seen when it is sent again"


STAND_IN = """#!/bin/sh
while [ "$1" != host.example ]; do shift; done
shift
exec sh -c "$*"
"""


def test_the_way_over_ssh(
    home: Home, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for ssh: it drops the host's name and runs the rest here."""
    stand_in = tmp_path / "ssh"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o700)
    monkeypatch.setenv("RSYNC_RSH", str(stand_in))
    home.learn()
    run(home, f"host.example:{place}")
    home.learn()
    assert run(home, f"host.example:{place}").generation == 2
    assert is_whole(place, tmp_path / "other", [home.state])
    found, ledger = bring_back(f"host.example:{place}", tmp_path / "third")
    ledger.close()
    assert is_same(found, home.state)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (lambda home: "", "is no place for a mirror"),
        (lambda home: "--rsync-path=evil", "is no place for a mirror"),
        (lambda home: str(home), "may not lie in one another"),
        (lambda home: str(home / "state" / "mirror"), "may not lie in one another"),
        (lambda home: str(home.parent), "may not lie in one another"),
        (lambda home: "rsync://host/x", "no encryption"),
        (lambda home: "host::module", "no encryption"),
    ],
)
def test_a_place_that_cannot_be_meant_is_refused(
    home: Home, where: Callable[[Path], str], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        mirror(home.path, NAME, where(home.path), lambda text: None)


def test_a_directory_with_something_else_is_left_alone(home: Home, place: Path) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingsError, match="has 'thesis.txt' and no mirror.json"):
        run(home, place)
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]


def test_the_mirror_of_another_model_is_left_alone(home: Home, place: Path) -> None:
    home.learn()
    run(home, place)
    row = json.loads((place / INDEX).read_text())
    (place / INDEX).write_text(json.dumps(row | {"model": "other"}))
    with pytest.raises(Conflict, match="is the mirror of 'other'"):
        run(home, place)


def test_a_home_that_has_the_model_is_not_overwritten(home: Home, place: Path) -> None:
    home.learn()
    run(home, place)
    with pytest.raises(Conflict, match="has the model 'tiny' already"):
        restore(home.path, str(place), lambda text: None)
    assert is_same(load_public(home.disk), first_state())


def test_what_is_no_mirror_is_not_restored(place: Path, tmp_path: Path) -> None:
    place.mkdir()
    with pytest.raises(SettingsError, match="it is not a whole mirror"):
        restore(tmp_path / "other", str(place), lambda text: None)


def test_a_ledger_in_use_is_copied_whole(home: Home, place: Path, tmp_path: Path) -> None:
    home.learn()
    with closing(sqlite3.connect(home.path / "state" / NAME / "ledger.sqlite")) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO cell VALUES ('half', 1)")
        run(home, place)
        other.rollback()
    _, ledger = bring_back(place, tmp_path / "other")
    assert ledger._row("SELECT * FROM cell WHERE key = 'half'") is None
    assert ledger.counts()["trained"] == 1
    ledger.close()
