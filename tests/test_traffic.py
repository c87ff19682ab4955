"""Whether anybody is being answered, seen from another opening of the same page."""

from pathlib import Path

import pytest

from actors.traffic import NUM_GAPS_KEPT, Traffic


@pytest.fixture
def path(tmp_path: Path) -> str:
    Traffic.create(str(tmp_path / "traffic"))
    return str(tmp_path / "traffic")


def test_before_the_first_request_it_was_always_idle(path: str) -> None:
    assert Traffic(path).idle_s() == float("inf")


def test_idle_begins_when_the_last_request_goes(path: str) -> None:
    door, reader = Traffic(path, is_writable=True), Traffic(path)
    door.enter()
    door.enter()
    door.leave()
    assert reader.idle_s() == 0.0
    door.leave()
    assert 0 < reader.idle_s() < 60
    assert reader.idle_s() < reader.idle_s()


def test_a_new_writer_begins_with_nobody_inside(path: str) -> None:
    Traffic(path, is_writable=True).enter()
    reader = Traffic(path)
    assert reader.idle_s() == 0.0
    Traffic(path, is_writable=True)
    assert 0 < reader.idle_s() < 60


def test_a_reader_cannot_write(path: str) -> None:
    with pytest.raises(TypeError):
        Traffic(path).enter()


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"x" * 4096)
    with pytest.raises(ValueError, match="other: is not a page of traffic"):
        Traffic(str(tmp_path / "other"))


def test_gaps_are_read_once_each_in_their_order(path: str) -> None:
    door, reader = Traffic(path, is_writable=True), Traffic(path)
    assert reader.gaps_ms(0) == []
    for ms in (10, 20, 30):
        door.note_gap(ms * 1_000_000)
    assert reader.gaps_ms(0) == [10, 20, 30]
    seen = reader.num_gaps()
    door.note_gap(40_000_000)
    assert reader.gaps_ms(seen) == [40]


def test_of_many_gaps_the_newest_are_kept_and_nothing_else_is_touched(path: str) -> None:
    door, reader = Traffic(path, is_writable=True), Traffic(path)
    door.enter()
    for number in range(3 * NUM_GAPS_KEPT + 7):
        door.note_gap(number * 1_000_000)
    newest = list(range(2 * NUM_GAPS_KEPT + 7, 3 * NUM_GAPS_KEPT + 7))
    assert reader.gaps_ms(5) == newest
    assert reader.idle_s() == 0.0, "the number of those inside is another field"
    assert Traffic(path).num_gaps() == 3 * NUM_GAPS_KEPT + 7
