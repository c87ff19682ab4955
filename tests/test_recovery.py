"""kill -9 under load: of all, through the experiment that does it; of what is around the engine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from experiments.kill_nine import outcome, read_ledger
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


NUM_EPOCHS = 20


@pytest.mark.parametrize("victim", ["trainer", "checkpoint", "dream"])
def test_answers_go_on_while_what_is_around_the_engine_restarts(
    cell: RunningCell, victim: str
) -> None:
    """Streams that run at the kill come to their end, new ones begin, and learning resumes."""
    model = cell.get("/v1/models")["data"][0]["id"]
    name = f"while {victim} dies, {os.urandom(3).hex()}"
    sample = {"id": name, "context": "The lamp is", "continuation": " lit at night."}
    body = {"samples": [sample], "config": {"learning_rate": 1e-6, "epochs": NUM_EPOCHS}}
    job = httpx.post(f"{cell.base}/train", json=body, timeout=60).json()["job_id"]
    while cell.get(f"/train/jobs/{job}")["steps"] < 2:
        time.sleep(0.1)
    before = cell.get("/status")
    outcomes: list[str] = []
    is_over = threading.Event()

    def chat() -> None:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Count to ten."}]}
        asked |= {"model": model, "max_tokens": 32, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=cell.base, timeout=120) as client:
            while not is_over.is_set():
                with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
                    outcomes.append(outcome(answer, b"".join(answer.iter_bytes())))

    readers = [threading.Thread(target=chat) for _ in range(2)]
    for reader in readers:
        reader.start()
    while len(outcomes) < 2:
        time.sleep(0.1)
    os.kill(before[victim]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while cell.is_ready():
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.05)
    num_before = len(outcomes)
    refused = httpx.post(f"{cell.base}/checkpoint", json={}, timeout=60)
    assert refused.status_code == 200 or refused.headers["retry-after"]
    cell.wait_ready()
    while len(outcomes) < num_before + 4:
        time.sleep(0.1)
    is_over.set()
    for reader in readers:
        reader.join()
    assert set(outcomes) == {"200"}, outcomes
    after = cell.get("/status")
    assert after["engine"]["pid"] == before["engine"]["pid"]
    assert after["engine"]["child_pids"] == before["engine"]["child_pids"]
    for role in ("trainer", "checkpoint", "dream"):
        assert after[role]["pid"] != before[role]["pid"]
    assert after["weights_version"] >= before["weights_version"]
    assert after["epoch"] > before["epoch"]
    assert cell.wait_job(job)["status"] == "done"
    assert read_ledger(cell.home)[name] == ("trained", NUM_EPOCHS, NUM_EPOCHS)
