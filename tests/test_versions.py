"""The version counter: one page of shared memory that one process writes and all others read."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from actors.versions import VersionCounter

ROOT = Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "versions")


def test_counter_starts_at_zero_in_a_private_file(path: str) -> None:
    counter = VersionCounter.create(path)
    assert (counter.weights_version, counter.epoch) == (0, 0)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_reader_sees_what_the_writer_wrote(path: str) -> None:
    writer = VersionCounter.create(path)
    reader = VersionCounter(path)
    for version in (1, 2, 2, 300, 2**40):
        writer.weights_version = version
        assert reader.weights_version == version
    writer.next_epoch()
    assert (reader.epoch, reader.weights_version) == (1, 2**40)


def test_version_in_the_making_is_named_as_long_as_it_is_written(path: str) -> None:
    counter = VersionCounter.create(path)
    counter.weights_version = 5
    assert counter.newest_version == 5
    counter.begin_writing()
    assert (counter.weights_version, counter.newest_version) == (5, 6)
    counter.weights_version += 1
    assert (counter.weights_version, counter.newest_version) == (6, 6)
    counter.begin_writing(40)
    assert (counter.weights_version, counter.newest_version) == (6, 40)


def test_a_step_that_nobody_computes_any_more_is_ended(path: str) -> None:
    counter = VersionCounter.create(path)
    counter.end_broken_step()
    assert counter.half_steps == 0, "there is none"
    never_ended = counter.step()
    never_ended.__enter__()
    assert counter.half_steps == 1
    counter.end_broken_step()
    assert counter.half_steps == 2


def test_another_process_sees_it_and_is_seen(path: str) -> None:
    writer = VersionCounter.create(path)
    writer.weights_version = 41
    script = (
        "import sys; from actors.versions import VersionCounter\n"
        "counter = VersionCounter(sys.argv[1], is_writable=True)\n"
        "counter.weights_version += 1; counter.next_epoch(); print(counter.weights_version)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "42\n", ended.stderr
    assert (writer.weights_version, writer.epoch) == (42, 1)


def test_version_is_never_taken_back(path: str) -> None:
    counter = VersionCounter.create(path)
    counter.weights_version = 5
    with pytest.raises(AssertionError, match="never taken back"):
        counter.weights_version = 4
    assert counter.weights_version == 5


def test_reader_cannot_write(path: str) -> None:
    VersionCounter.create(path)
    reader = VersionCounter(path)
    with pytest.raises(TypeError):
        reader.weights_version = 1
    with pytest.raises(TypeError):
        reader.next_epoch()
    assert (reader.weights_version, reader.epoch) == (0, 0)


def test_existing_counter_is_not_overwritten(path: str) -> None:
    VersionCounter.create(path).weights_version = 3
    with pytest.raises(FileExistsError):
        VersionCounter.create(path)
    assert VersionCounter(path).weights_version == 3


def test_counter_that_does_not_exist_yet_is_not_found(path: str) -> None:
    with pytest.raises(FileNotFoundError):
        VersionCounter(path)


def test_other_file_is_refused(path: str) -> None:
    Path(path).write_bytes(bytes(8192))
    with pytest.raises(ValueError, match="is not a version counter"):
        VersionCounter(path)
