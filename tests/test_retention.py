"""As the chain thins out, what is kept stays exact, and nothing that is needed goes."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from apollo.journal import codec, retention
from apollo.journal.chain import Generation, StoredFile
from apollo.journal.codec import Words
from apollo.journal.disk import DiskFull, RealDisk
from apollo.journal.journal import Journal, UnknownGeneration
from apollo.journal.recovery import open_journal
from apollo.journal.retention import DAY_S, HOUR_S, Retention, Thinned, kept, thin
from apollo.journal.segment import Segment
from apollo.journal.values import WeightsDamaged
from tests.crashes import FAR_S, FOLDER, Story, Teller, Violation, check, first_disk, long_life
from tests.model_disk import ModelDisk, crashes, whole_image
from tests.small_model import CHUNK_WORDS, NAME, State, first_state, is_same, learned, put_model

NOW = 1000 * DAY_S


def generations(*ages_s: float) -> list[Generation]:
    """Generations 0, 1, ... of these ages at `NOW`."""
    nothing = StoredFile("", 0, "")
    return [
        Generation(at, "commit", at - 1 if at else None, at, NOW - age_s, "", nothing, 0)
        for at, age_s in enumerate(ages_s)
    ]


@pytest.mark.parametrize(
    ("ages_s", "must_keep", "max_age_s", "expected"),
    [
        pytest.param([9e6], set(), 1.0, [0], id="one alone"),
        pytest.param([50, 40, 40, 0], set(), None, [0, 1, 2, 3], id="a young day, all"),
        pytest.param([DAY_S, DAY_S - 1, 9, 0], set(), None, [0, 1, 2, 3], id="just a day old"),
        pytest.param(
            [48.9 * HOUR_S, 48.5 * HOUR_S, 48.1 * HOUR_S, 47.9 * HOUR_S, 47.1 * HOUR_S, 0],
            set(),
            None,
            [0, 2, 4, 5],
            id="the newest of each hour, the first, and the newest",
        ),
        pytest.param(
            [30.2 * DAY_S, 29.9 * DAY_S, 29.5 * DAY_S, 29.1 * DAY_S, 28.5 * DAY_S, 0],
            set(),
            None,
            [0, 3, 4, 5],
            id="the newest of each day",
        ),
        pytest.param(
            [30 * DAY_S, 24.5 * HOUR_S, 24.2 * HOUR_S, 23.9 * HOUR_S],
            set(),
            None,
            [0, 2, 3],
            id="hours on the border of the young day",
        ),
        pytest.param(
            [30 * DAY_S, 7.02 * DAY_S, 6.98 * DAY_S, 6.95 * DAY_S, 6.9 * DAY_S],
            set(),
            None,
            [0, 1, 2, 3, 4],
            id="hours within the week, one day before it",
        ),
        pytest.param(
            [30.5 * DAY_S, 30.4 * DAY_S, 30.3 * DAY_S, 30.2 * DAY_S, 0],
            {1, 7},
            None,
            [0, 1, 3, 4],
            id="what must be kept",
        ),
        pytest.param(
            [30.5 * DAY_S, 20.5 * DAY_S, 10.5 * DAY_S, 0],
            set(),
            15 * DAY_S,
            [2, 3],
            id="the way back ends at the greatest age",
        ),
        pytest.param(
            [30.5 * DAY_S, 20.5 * DAY_S, 10.5 * DAY_S, 0],
            {1},
            15 * DAY_S,
            [1, 2, 3],
            id="but not after what must be kept",
        ),
        pytest.param([30 * DAY_S, 20 * DAY_S], set(), 1.0, [1], id="the newest has no age"),
        pytest.param([-HOUR_S, 5, -DAY_S, 0], set(), None, [0, 1, 2, 3], id="a clock set back"),
    ],
)
def test_what_is_kept(
    ages_s: list[float], must_keep: set[int], max_age_s: float | None, expected: list[int]
) -> None:
    found = kept(generations(*ages_s), NOW, must_keep, Retention(max_age_s=max_age_s))
    assert list(found) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 40 * DAY_S), min_size=1, max_size=40),
    st.sets(st.integers(0, 40)),
    st.one_of(st.none(), st.floats(0, 40 * DAY_S)),
)
def test_thinned_again_at_the_same_time_nothing_more_goes(
    ages_s: list[float], must_keep: set[int], max_age_s: float | None
) -> None:
    first = generations(*sorted(ages_s, reverse=True))
    retention = Retention(max_age_s=max_age_s)
    left = kept(first, NOW, must_keep, retention)
    again = kept([first[number] for number in left], NOW, must_keep, retention)
    assert again == left
    assert must_keep & {each.generation for each in first} <= set(left)


@st.composite
def ways(draw: st.DrawFn) -> list[Words]:
    """States of one chunk, each of any bits; between some only few words change."""
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    size = draw(st.integers(1, 200))
    states = [draw(arrays(dtype, size))]
    for _ in range(draw(st.integers(1, 6))):
        is_changed = draw(arrays(np.bool_, size))
        states.append(np.where(is_changed, draw(arrays(dtype, size)), states[-1]))
    return states


@settings(max_examples=300, deadline=None)
@given(ways())
def test_composed_deltas_do_what_the_direct_one_does(states: list[Words]) -> None:
    first, last = states[0], states[-1]
    deltas = [codec.encode(*pair) for pair in pairwise(states)]
    composed = codec.compose(deltas, len(first), first.itemsize)
    assert np.array_equal(codec.apply(first, composed), last)
    assert np.array_equal(codec.apply(last, composed, is_backward=True), first)
    assert composed == codec.encode(first, last)


def test_composing_refuses_what_is_not_a_delta_of_such_a_chunk() -> None:
    delta = codec.encode(np.zeros(4, np.uint16), np.ones(4, np.uint16))
    for wrong in [(3, 2), (4, 4)]:
        with pytest.raises(codec.CorruptDelta):
            codec.compose([delta], *wrong)


@pytest.fixture
def disk(tmp_path: Path) -> RealDisk:
    disk = RealDisk(tmp_path)
    put_model(disk, first_state())
    return disk


def taught(disk: RealDisk, num_commits: int, num_public: int) -> tuple[Journal, dict[int, State]]:
    """A journal, and the state of each generation; the first few were public in turn."""
    journal = open_journal(disk, NAME, chunk_words=CHUNK_WORDS).journal
    states = {0: first_state()}
    for number in range(1, num_commits + 1):
        states[number] = learned(states[number - 1], number)
        journal.commit(states[number], number * 10, f"optimizer {number}".encode(), number)
        if number <= num_public:
            journal.publish()
    return journal, states


def check_all(journal: Journal, states: dict[int, State], expected: list[int]) -> None:
    """Exactly the expected generations are kept, and each reads bit for bit."""
    assert [each.generation for each in journal.chain.generations] == expected
    for number, state in states.items():
        parts: dict[str, list[Words]] = {}
        if number not in expected:
            with pytest.raises(UnknownGeneration, match=f"generation {number} is not kept"):
                journal.words(0, number)
            continue
        for at, chunk in enumerate(journal.image.chunks):
            parts.setdefault(chunk.tensor, []).append(journal.words(at, number))
        assert is_same({name: np.concatenate(each) for name, each in parts.items()}, state)


def thin_late(journal: Journal, max_age_s: float | None = None) -> Thinned:
    return thin(journal, time.time() + FAR_S, Retention(max_age_s=max_age_s))


def test_what_is_kept_reads_bit_for_bit_before_and_after_a_publication(disk: RealDisk) -> None:
    journal, states = taught(disk, 8, 7)
    assert thin_late(journal).dropped == (1, 2, 3, 4, 5)
    left = [0, 6, 7, 8]
    check_all(journal, states, left)
    merged = journal.find(6)
    assert (merged.parent, merged.segment.name) == (0, "00000000-00000006.rvj")
    assert merged.num_changed == len(journal.values.segment(6).deltas)
    assert [name for name in disk.names(FOLDER) if name.endswith(".rvj")] == [
        "00000000-00000006.rvj",
        "00000006-00000007.rvj",
        "00000007-00000008.rvj",
        "base-00000000.rvj",
    ]
    assert journal.optimizer(journal.newest) == b"optimizer 8"
    journal.publish()
    check_all(journal, states, left)
    again = open_journal(disk, NAME, chunk_words=CHUNK_WORDS)
    assert again.set_aside == () and again.published is None
    check_all(again.journal, states, left)
    assert thin_late(journal) == Thinned((6,))
    check_all(journal, states, [0, 7, 8])


def test_a_young_chain_is_left_alone(disk: RealDisk) -> None:
    journal, states = taught(disk, 4, 4)
    before = disk.names(FOLDER)
    assert thin(journal, time.time()) == Thinned()
    assert disk.names(FOLDER) == before
    check_all(journal, states, [0, 1, 2, 3, 4])


def test_what_is_not_public_yet_is_kept(disk: RealDisk) -> None:
    """Only the journal has it: were the manifest damaged, the one before would have to name it."""
    journal, states = taught(disk, 5, 2)
    assert thin_late(journal) == Thinned()
    check_all(journal, states, [0, 1, 2, 3, 4, 5])


def test_a_return_and_a_way_that_leads_nowhere_are_merged(disk: RealDisk) -> None:
    journal, states = taught(disk, 3, 3)
    made = journal.roll_back(1, 31, is_learned_again=True, forgotten=("a",))
    states[4] = states[1]
    journal.publish()
    journal.commit(states[1], 40)
    states[5] = states[1]
    journal.publish()
    assert thin_late(journal).dropped == (1, 2, 3)
    found = journal.find(4)
    assert replace(found, segment=made.segment, parent=3, num_changed=made.num_changed) == replace(
        made, optimizer=found.optimizer
    )
    check_all(journal, states, [0, 4, 5])
    journal.roll_back(0, 50)
    states[6] = states[0]
    journal.publish()
    journal.commit(states[0], 60)
    states[7] = states[0]
    journal.publish()
    thin_late(journal)
    check_all(journal, states, [0, 6, 7])
    assert journal.find(6).num_changed == 0


def test_the_way_back_ends_at_what_the_directories_hold(disk: RealDisk) -> None:
    journal, states = taught(disk, 6, 5)
    assert thin_late(journal, max_age_s=FAR_S / 2).dropped == (0, 1, 2, 3)
    first = journal.chain.generations[0]
    assert (first.kind, first.parent, first.segment.name) == ("base", None, "base-00000004.rvj")
    assert journal.values.segment(4).deltas == {}
    check_all(journal, states, [4, 5, 6])
    again = open_journal(disk, NAME, chunk_words=CHUNK_WORDS)
    assert again.published == 6 and again.set_aside == ()
    check_all(again.journal, states, [4, 5, 6])


def test_learning_goes_on_after_thinning(disk: RealDisk) -> None:
    journal, states = taught(disk, 5, 5)
    thin_late(journal)
    states[6] = learned(states[5], 77)
    journal.commit(states[6], 777)
    journal.roll_back(0, 778)
    states[7] = states[0]
    journal.publish()
    check_all(journal, states, [0, 4, 5, 6, 7])


def test_a_damaged_segment_is_not_merged_and_those_beside_it_are(disk: RealDisk) -> None:
    """Merged, its damage would get a hash of its own."""
    journal, states = taught(disk, 3, 3)
    journal.roll_back(1, 100)
    where = disk.path(f"{FOLDER}/00000000-00000001.rvj")
    data = bytearray(where.read_bytes())
    data[10] ^= 1
    where.write_bytes(data)
    for _ in range(2):
        journal.publish(is_forced=True)
    found = thin_late(journal)
    assert found.dropped == () and "00000000-00000001.rvj" in found.damaged[0]
    assert thin_late(journal, 0.0).dropped == (0, 1, 2, 3)
    states[4] = states[1]
    check_all(journal, states, [4])


@pytest.mark.parametrize("is_checked", [True, False])
def test_nothing_is_merged_onto_a_table_that_is_damaged(
    disk: RealDisk, is_checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, states = taught(disk, 5, 5)
    where = disk.path(f"{FOLDER}/base-00000000.rvj")
    data = bytearray(where.read_bytes())
    data[20] ^= 1  # Within the table: a base has nothing before it.
    where.write_bytes(data)
    journal = open_journal(disk, NAME, chunk_words=CHUNK_WORDS).journal
    if not is_checked:
        monkeypatch.setattr(retention, "_has_root", lambda *_: True)
        monkeypatch.setattr(Segment, "follows", lambda *_: True)
        assert thin_late(journal).dropped, "what the other tests of this see"
        return
    found = thin_late(journal)
    assert found.dropped == () and "base-00000000.rvj" in found.damaged[0]
    assert thin_late(journal, FAR_S / 2) == Thinned((0, 1, 2, 3))
    check_all(journal, states, [4, 5])


def test_the_manifest_that_is_kept_beside_it_is_thinned_too(disk: RealDisk) -> None:
    """If the newest is damaged later, the one before must not name files that are gone."""
    journal, states = taught(disk, 6, 6)
    thin_late(journal)
    newest = max(name for name in disk.names(FOLDER) if name.startswith("manifest"))
    disk.path(f"{FOLDER}/{newest}").write_bytes(b"")
    again = open_journal(disk, NAME, chunk_words=CHUNK_WORDS)
    assert again.set_aside == (newest,)
    check_all(again.journal, states, [0, 5, 6])


def test_a_full_disk_changes_nothing() -> None:
    class FullDisk(ModelDisk):
        left = 10**9

        def write(self, path: str, offset: int, data: bytes | memoryview) -> None:
            self.left -= 1
            if self.left < 0:
                raise DiskFull("cannot write")
            super().write(path, offset, data)

    life = first_disk()
    teller = Teller(life, Story())
    for _ in range(5):
        teller.commit()
        teller.publish()
    image = whole_image(life)
    for room in range(60):
        disk = FullDisk(image)
        journal = open_journal(disk, NAME, chunk_words=CHUNK_WORDS).journal
        before = journal.chain
        disk.left = room
        try:
            thin_late(journal)
            break
        except DiskFull:
            if journal.chain.generations == before.generations:
                assert {n for n in disk.names(FOLDER) if n.endswith(".rvj")} == {
                    each.segment.name for each in before.generations
                }
            check_all(
                journal, teller.story.states, [g.generation for g in journal.chain.generations]
            )
            disk.left = 10**9
            thin_late(journal)
            check_all(journal, teller.story.states, [0, 4, 5])
    assert room > 5


def remove_first(journal: Journal, generations: tuple[Generation, ...]) -> None:
    journal._set(journal.chain.next(generations))
    journal.remove_unnamed()
    journal._set_durably(journal.chain)


WRONG = {
    "old files go before the manifest": (Journal, "replace_chain", remove_first),
    "only the last delta of a way is taken": (
        codec,
        "compose",
        lambda deltas, *_: list(deltas)[-1],
    ),
    "what the directories hold may go": (retention, "_needed", lambda journal: set()),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_thinning_is_found_out(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is checked after each crash, see `crashes.check`."""
    monkeypatch.setattr(*WRONG[wrong])
    disk, story = first_disk(), Story()
    with pytest.raises((Violation, WeightsDamaged)):
        long_life(disk, story)
        for crash in crashes(disk, 20, 0):
            check(crash, story)
