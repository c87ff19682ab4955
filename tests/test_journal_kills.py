"""kill -9 of the journal's process, through the experiment that does it 3,000 times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[1]
NUM_KILLS = 300
MAX_KILLS_TO_FIND = 300
"""Of a journal that is wrong."""


def kill(workplace: Path, times: int, *options: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-m", "experiments.journal_kills"]
    where = ["--times", str(times), "--directory", str(workplace)]
    return subprocess.run(
        [*script, *where, *options], cwd=ROOT, capture_output=True, text=True, timeout=500
    )


def test_no_kill_loses_what_was_acknowledged_or_shows_a_mixture(tmp_path: Path) -> None:
    table = tmp_path / "kills.json"
    done = kill(tmp_path, NUM_KILLS, "--json", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(table.read_text())
    assert result["kills"] == NUM_KILLS
    for op in ("commit", "commit with optimizer", "rollback", "publish", "recovery"):
        assert result["hit"].get(op, 0) >= 3, result
    assert sum(result["took_effect"].values()) > 0, result
    assert [path.name for path in tmp_path.iterdir()] == [table.name]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("hasty", "acknowledged: generation"),
        ("in-place", "public are not the words of generation"),
        ("no-draft", "recovery set aside"),
    ],
)
def test_a_wrong_journal_is_found(tmp_path: Path, fault: str, found: str) -> None:
    done = kill(tmp_path, MAX_KILLS_TO_FIND, "--fault", fault)
    assert done.returncode != 0, done.stdout
    assert "violation after" in done.stderr and found in done.stderr, done.stderr
    assert "violation after 0 kills" not in done.stderr, done.stderr
