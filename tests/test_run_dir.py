"""The private directory of a boot: dead cells' memory is freed, living cells' is left alone."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from actors import run_dir
from actors.errors import BootFailed

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /dev/shm, where other cells of this machine live."""
    place = tmp_path / "shm"
    place.mkdir()
    monkeypatch.setattr(run_dir, "SHARED_MEMORY", place)
    return place


def dead_pid() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def left_by(pid: int, shared_memory: Path, name: str) -> Path:
    """What a killed cell leaves: its directory, and the files that its vLLM made."""
    directory = shared_memory / f"reverie-{os.getuid()}-{name}"
    directory.mkdir()
    (directory / "owner").write_text(str(pid))
    (directory / "weights").write_bytes(b"x" * 1000)
    queue = shared_memory / f"psm_{name}"
    queue.write_bytes(b"queue")
    (directory / "vllm_files").write_text(f"{queue}\n{shared_memory}/sem.mp-{name}")
    return directory


def test_directory_is_private_and_says_who_owns_it(shared_memory: Path) -> None:
    directory = Path(run_dir.create())
    assert directory.parent == shared_memory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert (directory / "owner").read_text() == str(os.getpid())
    assert Path(run_dir.create()) != directory
    assert directory.exists(), "two cells of one process do not take each other's"


def test_what_a_dead_cell_left_is_removed_with_vllms_files(shared_memory: Path) -> None:
    left = left_by(dead_pid(), shared_memory, "dead")
    created = Path(run_dir.create())
    assert not left.exists()
    assert list(shared_memory.iterdir()) == [created]


def test_what_a_living_cell_uses_is_kept(shared_memory: Path) -> None:
    living = left_by(os.getppid(), shared_memory, "living")
    run_dir.create()
    assert (living / "weights").exists() and (shared_memory / "psm_living").exists()


def test_directories_of_others_are_kept(shared_memory: Path) -> None:
    for name in (f"reverie-{os.getuid() + 1}-other", "psm_other", "something"):
        (shared_memory / name).mkdir()
        (shared_memory / name / "owner").write_text(str(dead_pid()))
    unfinished = shared_memory / f"reverie-{os.getuid()}-unfinished"
    unfinished.mkdir()
    run_dir.create()
    assert len(list(shared_memory.iterdir())) == 5


def test_directory_that_is_just_being_made_is_kept(shared_memory: Path) -> None:
    young = shared_memory / f"reverie-{os.getuid()}-young"
    young.mkdir()
    (young / "owner").write_text("")  # opened, not yet written
    run_dir.create()
    assert young.exists()


def test_remove_frees_everything_and_may_be_repeated(shared_memory: Path) -> None:
    directory = left_by(os.getpid(), shared_memory, "own")
    run_dir.remove(directory)
    assert list(shared_memory.iterdir()) == []
    run_dir.remove(directory)


def test_model_is_in_the_hands_of_one_cell(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "import sys; from pathlib import Path; from actors import run_dir\n"
        "run_dir.lock(Path(sys.argv[1]), 'tiny'); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BootFailed, match=r"model tiny is already being taught by another cell"):
            run_dir.lock(path, "tiny")
        holder.kill()
        holder.wait(30)
        os.close(run_dir.lock(path, "tiny"))  # the lock of a killed process is gone with it
    finally:
        if holder.poll() is None:
            holder.kill()
            holder.wait()


def test_lock_is_free_again_after_its_release(tmp_path: Path) -> None:
    first = run_dir.lock(tmp_path / "lock", "tiny")
    with pytest.raises(BootFailed):
        run_dir.lock(tmp_path / "lock", "tiny")
    os.close(first)
    os.close(run_dir.lock(tmp_path / "lock", "tiny"))
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
