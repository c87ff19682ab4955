"""The journal on a real disk: what is committed comes back, bit by bit, and only that."""

from pathlib import Path

import numpy as np
import pytest

from apollo.journal.disk import RealDisk, lease
from apollo.journal.journal import Journal, UnknownGeneration
from apollo.journal.recovery import Recovered, open_journal
from apollo.journal.values import WeightsDamaged
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


def test_a_damaged_manifest_is_set_aside_for_the_one_before(disk: RealDisk) -> None:
    states = taught(opened(disk).journal, 2)
    newest = max(name for name in disk.names(FOLDER) if name.startswith("manifest"))
    damage(disk, f"{FOLDER}/{newest}")
    again = opened(disk)
    assert again.journal.newest.generation == 1
    assert set(again.set_aside) == {
        newest,
        "00000001-00000002.rvj",
        "optimizer-00000002.safetensors",
    }
    assert is_same(load_public(disk), states[1])


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


def test_without_an_undamaged_copy_nothing_is_published(disk: RealDisk) -> None:
    journal = opened(disk).journal
    states = taught(journal, 1)
    damage(disk, f"{PUBLIC}/b.safetensors", -1)
    with pytest.raises(WeightsDamaged, match=r"layer\.b: no copy of its words 8 to 8"):
        journal.publish()
    assert not is_same(load_public(disk), states[1])


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
