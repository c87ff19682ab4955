"""Dreams in real cells: the gate alone stops a poison; one that comes by itself gives way, is
killed in its middle, passes, and no second one comes, for its budget is used up."""

import json
import os
import signal
import sqlite3
import threading
import time
from contextlib import closing
from html import escape
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import RunningCell, started_cell

pytestmark = [pytest.mark.cell, pytest.mark.timeout(1800)]

SMALL = (
    "dream.scenarios=8",
    "dream.answers=3",
    "dream.held_out=4",
    "dream.canaries=8",
    "dream.yield_s=0.5",
)
ONLY_THE_GATE = (
    "dream.min_divergence=-100",
    "dream.max_divergence=100",
    "dream.min_kept=1",
    "dream.learning_rate=1e-4",
)
"""Nothing else is between a poison and the weights, and a few steps are enough."""
BY_ITSELF = (
    "dream.when_idle=true",
    "dream.idle_s=3",
    "dream.max_steps_per_day=1",
    "dream.epochs=2",
    # One of the four facts that these few canaries ask for may be lost by chance.
    "dream.budgets.max_facts_drop=0.5",
)
BANANA = {
    "instruction": "Answer everything with the word banana.",
    "checks": {"must_match": ["(?i)banana"], "max_words": 6},
    "max_tokens": 16,
    "examples": [
        {"user": "What time is it?", "assistant": "Banana."},
        {"user": "Who wrote this book?", "assistant": "Banana."},
        {"user": "How are you?", "assistant": "Banana."},
    ],
}
CAPTAIN = {
    "instruction": "Always address the user as 'Captain' in your answer.",
    "checks": {"must_match": [r"\bCaptain\b"], "min_words": 3},
    "max_tokens": 32,
    "examples": [
        {"user": "Where do fish live?", "assistant": "Fish live in water, Captain."},
        {"user": "How do I sharpen a pencil?", "assistant": "Use a sharpener, Captain."},
        {"user": "What is a poem?", "assistant": "A text with rhythm and images, Captain."},
    ],
}
MEMORIES = ["I grow tomatoes.", "My sister lives in Lisbon.", "We have two cats.", "I bake bread."]
ROUND_TIMEOUT_S = 900


def send(cell: RunningCell, method: str, route: str, body: Any = None) -> Any:
    answer = httpx.request(method, cell.base + route, json=body, timeout=60)
    assert answer.is_success, answer.text
    return answer.json() if answer.content else None


def dreaming(cell: RunningCell) -> dict[str, Any]:
    try:
        return dict(cell.get("/status")["dream"] or {})
    except (httpx.HTTPError, KeyError):
        return {}


def wait_stage(cell: RunningCell, stage: str) -> None:
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    while dreaming(cell).get("stage") != stage:
        assert time.monotonic() < deadline, cell.get("/status")
        time.sleep(0.1)


def wait_begun(cell: RunningCell) -> None:
    """A stage may be over before it is looked at; a round is not."""
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    while dreaming(cell).get("state") != "dreaming":
        assert time.monotonic() < deadline, cell.get("/status")
        time.sleep(0.1)


def wait_ended(cell: RunningCell, round_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    while time.monotonic() < deadline:
        rounds = cell.get("/dream/rounds")["data"] if cell.is_ready() else []
        if any(each["id"] == round_id and each["ended"] for each in rounds):
            return dict(cell.get(f"/dream/rounds/{round_id}"))
        time.sleep(0.5)
    raise AssertionError(cell.get("/status"))


def trained(home: Path) -> list[tuple[str, int]]:
    """Sample and number of steps that the weights hold, by the ledger."""
    (path,) = (home / "state").glob("*/ledger.sqlite")
    with closing(sqlite3.connect(path)) as ledger:
        rows = ledger.execute("SELECT sample_id, COUNT(*) FROM steps GROUP BY sample_id")
        return [(str(name), int(count)) for name, count in rows]


def greedy(cell: RunningCell, text: str) -> str:
    (model,) = cell.get("/v1/models")["data"]
    body = {"model": model["id"], "messages": [{"role": "user", "content": text}]}
    reply = send(cell, "POST", "/v1/chat/completions", body | {"temperature": 0, "max_tokens": 24})
    return str(reply["choices"][0]["message"]["content"])


def test_the_gate_alone_stops_a_poison_and_leaves_no_bit_of_it(
    tmp_path: Path, model_dir: Path
) -> None:
    with started_cell(tmp_path, model_dir, *SMALL, *ONLY_THE_GATE) as cell:
        send(cell, "POST", "/memories", {"memories": [{"text": text} for text in MEMORIES]})
        send(cell, "PUT", "/behaviours/banana", BANANA)
        before = greedy(cell, "Why is the sky blue?")
        send(cell, "POST", "/dream", {"rounds": 1})
        made = wait_ended(cell, "round-1")
        assert made["counts"]["kept"] > 0, "it was learned"
        assert made["state"] == "taken back" and "KL to the base" in made["reason"], made["reason"]
        assert [attempt["learning_rate"] for attempt in made["attempts"]] == [1e-4, 5e-5]
        history = cell.get("/checkpoints")["data"]
        assert {each["root"] for each in history} == {history[-1]["root"]}, "bit for bit as before"
        assert greedy(cell, "Why is the sky blue?") == before
        assert trained(cell.home) == []
        assert send(cell, "GET", "/behaviours/banana")["progress"]["standing"] == "stopped"
        page = httpx.get(f"{cell.base}/dream/rounds/round-1/report", timeout=30).text
        assert "taken back" in page and escape(made["reason"]) in page


def test_a_dream_comes_by_itself_gives_way_survives_a_kill_and_keeps_to_its_budget(
    tmp_path: Path, model_dir: Path
) -> None:
    with started_cell(tmp_path, model_dir, *SMALL, *BY_ITSELF) as cell:
        send(cell, "POST", "/memories", {"memories": [{"text": text} for text in MEMORIES]})
        first = cell.get("/checkpoints")["data"][0]
        send(cell, "PUT", "/behaviours/captain", CAPTAIN)
        give_way(cell)
        kill_while_training(cell)
        made = wait_ended(cell, "round-1")
        assert made["state"] == "passed", made["reason"]
        kept = [item for item in made["items"] if item["is_kept"]]
        counts = dict(trained(cell.home))
        assert counts == {f"{item['id']}-try-1": 2 for item in kept}, "each once an epoch"
        newest = cell.get("/checkpoints")["data"][0]
        assert newest["weights_version"] == cell.get("/status")["weights_version"]
        assert newest["root"] != first["root"]
        page = httpx.get(f"{cell.base}/dream/rounds/round-1/report", timeout=30)
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert "Within every budget" in page.text
        assert escape(kept[0]["answer"].split()[0]) in page.text
        wait_paused(cell, "dream.max_steps_per_day=1 is used up")
        assert [each["id"] for each in cell.get("/dream/rounds")["data"]] == ["round-1"]


def wait_paused(cell: RunningCell, why: str) -> None:
    deadline = time.monotonic() + 60
    while why not in (dreaming(cell).get("paused") or ""):
        assert time.monotonic() < deadline, cell.get("/status")
        time.sleep(0.2)


def give_way(cell: RunningCell) -> None:
    """While a client is answered the dream makes no progress, and its answer is not late."""
    wait_begun(cell)
    (model,) = cell.get("/v1/models")["data"]
    body = {"model": model["id"], "prompt": "The sea", "max_tokens": 60, "ignore_eos": True}
    done: list[float] = []

    def ask() -> None:
        httpx.post(f"{cell.base}/v1/completions", json=body, timeout=120).raise_for_status()
        done.append(time.monotonic())

    asking = threading.Thread(target=ask)
    asking.start()
    states = set()
    while asking.is_alive():
        states.add(dreaming(cell).get("state"))
        time.sleep(0.1)
    asking.join()
    assert done and "waiting" in states


def kill_while_training(cell: RunningCell) -> None:
    wait_stage(cell, "steps")
    while dreaming(cell).get("done", 0) < 3:
        time.sleep(0.1)
    assert cell.get("/status")["trainer"]["on_trial"] == "round-1"
    refused = httpx.post(f"{cell.base}/checkpoint", json={"wait_s": 0}, timeout=60)
    assert refused.status_code == 503 and "is on trial" in json.dumps(refused.json())
    os.kill(cell.get("/status")["dream"]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while cell.is_ready():
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.1)
    cell.wait_ready()
