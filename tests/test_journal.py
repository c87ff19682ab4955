"""The journal on a real disk: what is committed comes back, bit by bit, and only that."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load

from apollo.journal.chain import UnknownFormat
from apollo.journal.disk import DiskFailed, NotAPlainFile, RealDisk, lease
from apollo.journal.image import ImageError
from apollo.journal.journal import Journal, UnknownGeneration
from apollo.journal.recovery import Recovered, open_journal
from apollo.journal.segment import SegmentDamaged
from apollo.journal.values import WeightsDamaged
from apollo.weights import manifest
from tests.small_model import (
    CHUNK_WORDS,
    NAME,
    PUBLIC,
    State,
    files_of,
    first_state,
    is_same,
    learned,
    load_public,
    put_model,
)

NUM_SWAPS = 100
FOLDER = f"state/{NAME}/journal"


@pytest.fixture
def disk(tmp_path: Path) -> RealDisk:
    disk = RealDisk(tmp_path)
    put_model(disk, first_state())
    return disk


def opened(disk: RealDisk) -> Recovered:
    return open_journal(disk, NAME, chunk_words=CHUNK_WORDS)


def taught(journal: Journal, num_commits: int) -> list[State]:
    """States of generations 0, 1, ...; the newest is the last."""
    states = [first_state()]
    for number in range(1, num_commits + 1):
        states.append(learned(states[-1], number))
        journal.commit(states[-1], number * 10, f"optimizer {number}".encode(), number)
    return states


def values(journal: Journal, generation: int) -> State:
    """All words of a generation, as the journal gives them."""
    parts: dict[str, list[np.ndarray]] = {}
    for at, chunk in enumerate(journal.image.chunks):
        parts.setdefault(chunk.tensor, []).append(journal.words(at, generation))
    return {name: np.concatenate(each) for name, each in parts.items()}


def damage(disk: RealDisk, path: str, offset: int = -40) -> None:
    """Flip one bit of a file."""
    where = disk.path(path)
    data = bytearray(where.read_bytes())
    data[offset] ^= 1
    where.write_bytes(data)


def test_every_generation_can_be_read_before_and_after_a_publication(disk: RealDisk) -> None:
    journal = opened(disk).journal
    states = taught(journal, 4)
    for published in (False, True):
        if published:
            journal.publish()
        for generation, state in enumerate(states):
            assert is_same(values(journal, generation), state)
    assert is_same(load_public(disk), states[-1])


def test_a_commit_does_not_change_what_is_public(disk: RealDisk) -> None:
    journal = opened(disk).journal
    taught(journal, 1)
    assert is_same(load_public(disk), first_state())
    assert journal.public.generation == 0


def test_opening_again_publishes_the_newest_generation(disk: RealDisk) -> None:
    states = taught(opened(disk).journal, 3)
    again = opened(disk)
    assert again.published == 3 and again.set_aside == ()
    assert is_same(load_public(disk), states[-1])
    assert again.journal.public.weights_version == 30
    assert again.journal.optimizer(again.journal.newest) == b"optimizer 3"
    assert opened(disk).published is None


def test_unchanged_chunks_cost_only_a_hash(disk: RealDisk) -> None:
    journal = opened(disk).journal
    state = first_state()
    state["layer.b"] = state["layer.b"].copy()
    state["layer.b"][8] ^= 1  # The second chunk of it.
    made = journal.commit(state, 1)
    assert made.num_changed == 1 and len(journal.values.segment(1).deltas) == 1


def test_the_same_version_is_not_committed_twice(disk: RealDisk) -> None:
    journal = opened(disk).journal
    taught(journal, 1)
    before = disk.names(FOLDER)
    assert journal.commit(first_state(), 10).generation == 1
    assert disk.names(FOLDER) == before


def test_a_return_is_a_new_generation_and_can_be_undone_itself(disk: RealDisk) -> None:
    journal = opened(disk).journal
    states = taught(journal, 3)
    made = journal.roll_back(2, 31)
    assert (made.generation, made.returns_to, made.weights_version) == (4, 2, 31)
    assert made.undone_after == 20
    assert journal.optimizer(made) == b"optimizer 2"
    journal.publish()
    assert is_same(load_public(disk), states[2])
    journal.roll_back(3, 32)
    journal.publish()
    assert is_same(load_public(disk), states[3])
    with pytest.raises(UnknownGeneration, match="generation 9 is not kept"):
        journal.roll_back(9, 33)


@pytest.mark.parametrize("generation", [2, 3])
def test_a_damaged_tail_is_set_aside(disk: RealDisk, generation: int) -> None:
    states = taught(opened(disk).journal, 3)
    damage(disk, f"{FOLDER}/{generation - 1:08d}-{generation:08d}.rvj")
    again = opened(disk)
    assert again.journal.newest.generation == generation - 1
    assert f"{generation - 1:08d}-{generation:08d}.rvj" in again.set_aside
    assert set(disk.names(f"state/{NAME}/aside-001")) == set(again.set_aside)
    assert is_same(load_public(disk), states[generation - 1])
    again.journal.commit(learned(states[generation - 1], 99), 99)
    assert opened(disk).published == generation


@pytest.mark.parametrize("is_published", [True, False])
@pytest.mark.parametrize("which", [-1, -2])
def test_a_damaged_manifest_is_set_aside_and_its_twin_loses_nothing(
    disk: RealDisk, which: int, is_published: bool
) -> None:
    journal = opened(disk).journal
    states = taught(journal, 2)
    if is_published:
        journal.publish()
    damaged = [name for name in disk.names(FOLDER) if name.startswith("manifest")][which]
    damage(disk, f"{FOLDER}/{damaged}")
    again = opened(disk)
    assert again.set_aside == ((damaged,) if which == -1 else ())
    assert [each.kind for each in again.journal.chain.generations] == ["base", "commit", "commit"]
    for generation, state in enumerate(states):
        assert is_same(values(again.journal, generation), state)
    assert again.journal.optimizer(again.journal.newest) == b"optimizer 2"


def test_a_public_directory_newer_than_the_chain_is_kept(disk: RealDisk) -> None:
    journal = opened(disk).journal
    states = taught(journal, 3)
    journal.publish()
    disk.path(f"{FOLDER}/00000001-00000002.rvj").unlink()
    again = opened(disk)
    assert again.journal.newest.generation == 3 and again.journal.newest.kind == "base"
    assert is_same(load_public(disk), states[3])


@pytest.mark.parametrize("slot", ["models/tiny", "models/.tiny.next"])
def test_a_damaged_slot_is_rebuilt_from_the_other(disk: RealDisk, slot: str) -> None:
    journal = opened(disk).journal
    states = taught(journal, 1)
    journal.publish()
    damage(disk, f"{slot}/b.safetensors", -1)
    states.append(learned(states[-1], 2))
    journal.commit(states[-1], 20)
    journal.publish()
    assert is_same(load_public(disk), states[-1])


def test_where_a_segment_is_missing_the_other_slot_gives_what_is_before_it(disk: RealDisk) -> None:
    journal = opened(disk).journal
    states = taught(journal, 1)
    journal.publish()
    for number in (2, 3, 4):
        states.append(learned(states[-1], number))
        journal.commit(states[-1], number * 10)
    journal.publish()
    journal.commit(learned(states[-1], 5), 50)
    disk.path(f"{FOLDER}/00000002-00000003.rvj").unlink()
    for generation in (0, 1, 2, 4):
        assert is_same(values(journal, generation), states[generation])
    with pytest.raises(SegmentDamaged, match="00000002-00000003.rvj is missing"):
        journal.words(0, 3)


def test_a_bad_sector_of_one_slot_is_read_around(disk: RealDisk) -> None:
    class BadSector(RealDisk):
        def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
            if path == f"{PUBLIC}/b.safetensors" and offset:  # Not the header.
                raise DiskFailed(f"cannot read {path}: Input/output error")
            return super().read(path, offset, size)

    journal = opened(disk).journal
    states = taught(journal, 1)
    journal.publish()
    states.append(learned(states[-1], 2))
    journal.commit(states[-1], 20)
    assert opened(BadSector(disk.path("models").parent)).published == 2
    assert is_same(load_public(disk), states[-1])


def test_a_disk_that_cannot_be_read_is_named_as_the_reason(disk: RealDisk) -> None:
    class DeadDisk(RealDisk):
        is_dead = False

        def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
            if self.is_dead and path.endswith(".safetensors"):
                raise DiskFailed(f"cannot read {path}: Input/output error")
            return super().read(path, offset, size)

    dead = DeadDisk(disk.path("models").parent)
    journal = opened(dead).journal
    taught(journal, 1)
    dead.is_dead = True
    with pytest.raises(WeightsDamaged, match=r"\(cannot read models/.*Input/output error\)"):
        journal.words(0, 1)


def test_without_an_undamaged_copy_nothing_is_published(disk: RealDisk) -> None:
    journal = opened(disk).journal
    states = taught(journal, 1)
    damage(disk, f"{PUBLIC}/b.safetensors", -1)
    with pytest.raises(WeightsDamaged, match=r"layer\.b: no copy of its words 8 to 8"):
        journal.publish()
    assert not is_same(load_public(disk), states[1])


def test_a_reader_sees_one_complete_generation_at_every_instant(disk: RealDisk) -> None:
    """Files opened by name, one after the other, under a lease; while another is published."""
    journal = opened(disk).journal
    states = [first_state()]
    is_over, torn = threading.Event(), list[str]()

    def read() -> None:
        while not is_over.is_set():
            with lease(disk.path(PUBLIC)) as directory:
                held = manifest.require(directory)
                time.sleep(0.001)
                seen: State = {}
                for name in ("a.safetensors", "b.safetensors"):
                    for tensor, found in load((directory / name).read_bytes()).items():
                        seen[tensor] = found.view({2: np.uint16, 4: np.uint32}[found.itemsize])
                if not is_same(seen, states[held.generation]):
                    torn.append(f"generation {held.generation}")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, NUM_SWAPS + 1):
        states.append(learned(states[-1], number))
        journal.commit(states[-1], number)
        journal.publish()
    is_over.set()
    reader.join(10)
    assert not torn and not reader.is_alive()
    assert is_same(load_public(disk), states[-1])


def test_what_is_live_and_not_published_is_refused_by_name(disk: RealDisk) -> None:
    journal = opened(disk).journal
    state = learned(first_state(), 1)
    with pytest.raises(ImageError, match=r"layer\.new is live or published, but not both"):
        journal.commit(state | {"layer.new": state["layer.a"]}, 1)
    del state["layer.b"]
    with pytest.raises(ImageError, match=r"layer\.b is live or published"):
        journal.commit(state, 1)
    assert journal.newest.generation == 0


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_link_in_the_place_of_a_file_is_refused(disk: RealDisk, kind: str) -> None:
    """What is written through a link is written elsewhere: into a cache that others read, say."""
    where, elsewhere = disk.path(f"{PUBLIC}/config.json"), disk.path("elsewhere")
    where.rename(elsewhere)
    if kind == "symbolic":
        where.symlink_to(elsewhere)
    else:
        where.hardlink_to(elsewhere)
    journal = opened(disk).journal
    journal.commit(learned(first_state(), 1), 1)
    with pytest.raises(NotAPlainFile, match=f"config.json is a {kind} link"):
        journal.publish()
    assert is_same(load_public(disk), first_state())


def test_a_failed_sync_is_not_tried_again(disk: RealDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(disk).journal

    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskFailed, match="cannot sync .*Input/output error"):
        journal.commit(learned(first_state(), 1), 1)
    monkeypatch.undo()
    assert opened(disk).journal.newest.generation == 0


def test_a_leased_directory_is_not_touched(disk: RealDisk) -> None:
    journal = opened(disk).journal
    with lease(disk.path(PUBLIC)) as old:
        states = taught(journal, 3)
        for number in (4, 5):
            journal.publish()
            states.append(learned(states[-1], number))
            journal.commit(states[-1], number * 10)
        journal.publish()
        data = {name: (old / name).read_bytes() for name in ("a.safetensors", "b.safetensors")}
    assert data == files_of(first_state())
    assert is_same(load_public(disk), states[-1])


def test_a_directory_that_somebody_put_there_does_not_stop_publications(disk: RealDisk) -> None:
    strange = disk.path(f"{PUBLIC}/.cache/deep")
    strange.mkdir(parents=True)
    (strange / "file").write_text("x")
    journal = opened(disk).journal
    state = first_state()
    for number in range(1, 5):
        state = learned(state, number)
        journal.commit(state, number)
        journal.publish()
    assert is_same(load_public(disk), state)


def test_a_manifest_of_another_version_is_left_alone(disk: RealDisk) -> None:
    taught(opened(disk).journal, 2)
    before = {name: disk.read(f"{FOLDER}/{name}") for name in disk.names(FOLDER)}
    newest = max(name for name in before if name.startswith("manifest"))
    body = json.loads(before[newest])["body"].replace('"format": 1', '"format": 2')
    envelope = {"hash": blake3(body.encode()).hexdigest(), "body": body}
    disk.path(f"{FOLDER}/{newest}").write_text(json.dumps(envelope))
    with pytest.raises(UnknownFormat, match="written by another version"):
        opened(disk)
    assert disk.names(FOLDER) == sorted(before) and not disk.names(f"state/{NAME}/aside-001")


def test_what_is_learned_is_readable_by_this_user_only(disk: RealDisk) -> None:
    journal = opened(disk).journal
    taught(journal, 1)
    journal.publish()
    modes = {
        name: disk.path(f"{FOLDER}/{name}").stat().st_mode & 0o777 for name in disk.names(FOLDER)
    }
    assert set(modes.values()) == {0o600}
    assert disk.path(f"{PUBLIC}/a.safetensors").stat().st_mode & 0o777 == 0o644


def test_models_on_another_disk_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "home").mkdir()
    elsewhere = RealDisk(tmp_path / "other")
    put_model(elsewhere, first_state())
    (tmp_path / "home" / "models").symlink_to(tmp_path / "other" / "models")
    (tmp_path / "home" / "state").mkdir()
    disk = RealDisk(tmp_path / "home")
    journal = opened(disk).journal
    states = taught(journal, 2)
    journal.publish()
    assert is_same(load_public(elsewhere), states[-1])


def test_a_mount_point_is_refused_before_anything_is_written(
    disk: RealDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.refuse_mount_point(PUBLIC)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(NotAPlainFile, match="models/tiny is a mount point"):
        disk.refuse_mount_point(PUBLIC)
