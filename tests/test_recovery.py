"""kill -9 under load, through the experiment that does it five times each; here once each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RunningCell

pytestmark = [pytest.mark.cell, pytest.mark.timeout(2100)]


def test_killed_processes_come_back_and_no_acknowledged_sample_is_lost(
    cell: RunningCell, tmp_path: Path
) -> None:
    """The script ends with an error if a sample is lost, or trained twice in what survived."""
    table = tmp_path / "kills.json"
    command = [sys.executable, "-m", "experiments.kill_nine", "--base", cell.base]
    command += ["--home", str(cell.home)]
    done = subprocess.run(
        [
            *command,
            "--times",
            "1",
            "--victims",
            "engine,trainer,ingress,cell",
            "--json",
            str(table),
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=2000,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(table.read_text())
    assert [row["victim"] for row in result["kills"]] == ["engine", "trainer", "ingress", "cell"]
    assert result["samples"].get("trained", 0) > 0
    for row in result["kills"][:2]:
        assert row["not_ready_after_s"] < 10, row
    # Serve's own proxy may answer 500 to what was inside the killed ingress; nothing else may.
    wrong = [
        answer
        for answer in result["answers"]
        if ("500" in answer and "Internal Server Error" not in answer) or "without" in answer
    ]
    assert not wrong, result["answers"]
    assert result["answers"].get("503", 0) > 0, "no client saw that the cell was away"
