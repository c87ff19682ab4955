"""Whether anybody is being answered, seen from another opening of the same page."""

from pathlib import Path

import pytest

from actors.traffic import Traffic


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
