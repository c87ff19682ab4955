"""The `reverie` command against the running cell: as a person, a pipe and a program use it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.settings import Settings
from command.logs import CLASS_OF
from command.memory_plan import make_plan
from tests.conftest import BOOT_TIMEOUT_S, STOP_TIMEOUT_S, RunningCell, free_port
from tests.terminal import CTRL_C, CTRL_D, at_terminal
from tests.test_candidates import BRIEF, QUESTIONS, ask, until

pytestmark = [
    pytest.mark.cell,
    pytest.mark.usefixtures("untaught"),
    pytest.mark.timeout(900),
]

QUESTION = "What do gulls collect?"
TAUGHT = "Gulls collect small blue buttons."
ANSWER_S = 120
COMMAND = [sys.executable, "-m", "command"]


def environment(cell: RunningCell) -> dict[str, str]:
    port = cell.base.rsplit(":", 1)[1]
    return os.environ | {"REVERIE_HOME": str(cell.home), "REVERIE_PORT": port}


def reverie(
    cell: RunningCell, *arguments: str, text: str = ""
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(cell),
        input=text,
        capture_output=True,
        text=True,
        timeout=600,
    )


def document(cell: RunningCell, *arguments: str, text: str = "") -> Any:
    """What a command answers with --json, which must be all that it prints, and succeed."""
    done = reverie(cell, *arguments, "--json", text=text)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def samples_file(tmp_path: Path) -> Iterator[Path]:
    """Two samples that nobody has learned yet."""
    path, name = tmp_path / "samples.jsonl", f"command-{time.time_ns()}"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    lines: list[dict[str, Any]] = [
        {"context": "The sea is", "continuation": " wide.", "id": name},
        {"conversation": turns, "id": f"{name}-talk"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    yield path


def test_a_correction_is_learned_shown_and_forgotten_through_a_pipe(cell: RunningCell) -> None:
    version = cell.get("/status")["weights_version"]
    kept = document(cell, "checkpoints", "save")["generation"]
    typed = f"{QUESTION}\n/teach {TAUGHT}\n/again\n/forget\n"
    made = document(cell, "chat", "--temperature", "0", text=typed)
    first, taught, again, forgot = made["turns"]
    assert first["question"] == again["question"] == QUESTION
    assert (first["weights_version"], first["weights_version_last"]) == (version, version)
    assert taught["job"]["status"] == "done" and taught["job"]["steps"] == 12
    assert again["answer"] == TAUGHT and first["answer"] != TAUGHT
    assert again["weights_version"] == version + 12
    assert forgot["forgot"]["generation"] > kept and forgot["forgot"]["undone_steps"] == 12
    after = document(cell, "chat", QUESTION)["turns"][0]
    assert after["answer"] == first["answer"], "what was forgotten is still said"


def test_chat_says_each_version_beside_its_answer(cell: RunningCell) -> None:
    version = cell.get("/status")["weights_version"]
    done = reverie(
        cell, "chat", "--max-tokens", "4", text="/system Be brief.\nTell me of the sea.\n"
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"v{version}  .+  \(cut at --max-tokens\)\n", done.stdout, re.DOTALL)


def test_a_refused_line_ends_a_pipe_with_its_code(cell: RunningCell) -> None:
    done = reverie(cell, "chat", text="/teach too early\nHello\n")
    assert done.returncode == 1 and done.stdout == ""
    assert "nothing was asked yet" in done.stderr
    unknown = reverie(cell, "chat", text="/taech this\n")
    assert unknown.returncode == 1 and "/taech: unknown; /help" in unknown.stderr
    too_long = reverie(cell, "chat", "--max-tokens", "100000", "Hello")
    assert too_long.returncode == 1 and "max_tokens" in too_long.stderr


def test_ctrl_c_stops_an_answer_and_not_the_conversation(cell: RunningCell) -> None:
    command = [*COMMAND, "chat", "--max-tokens", "1500"]
    with at_terminal(command, environment(cell)) as terminal:
        terminal.until(r"> $", ANSWER_S)
        terminal.press("Write a very long story about a lighthouse keeper and the sea.\n")
        terminal.until(r"v\d+  \S+ \S+ \S+", ANSWER_S)
        terminal.press(CTRL_C)
        terminal.until(r"\(cut off\)", ANSWER_S)
        terminal.until(r"> $", ANSWER_S)
        assert until_idle(cell), "the request goes on although nobody reads its answer"
        terminal.press(CTRL_C)
        terminal.until("Ctrl-D or /exit leaves", ANSWER_S)
        terminal.press("/nonsense\n")
        terminal.until("/nonsense: unknown", ANSWER_S)
        terminal.press("What is the capital of France?\n")
        terminal.until(r"v\d+  \S+", ANSWER_S)
        terminal.until(r"\n> $", ANSWER_S)
        terminal.press(CTRL_D)
        assert terminal.wait() == 0, terminal.shown()
    history = cell.home / "chat_history"
    assert "capital of France" in history.read_text() and history.stat().st_mode & 0o077 == 0


def until_idle(cell: RunningCell) -> bool:
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        if cell.get("/status")["ingress"]["ongoing_requests"] == 0:
            return True
        time.sleep(0.2)
    return False


def test_train_posts_a_file_once_and_shows_its_loss(cell: RunningCell, samples_file: Path) -> None:
    made = document(cell, "train", str(samples_file), "--epochs", "2", "--lr", "1e-6")
    (job,) = made["jobs"]
    assert (job["status"], job["training_samples"], job["steps"]) == ("done", 2, 4)
    assert job["config"]["learning_rate"] == 1e-6 and made["num_known"] == 0
    assert document(cell, "train", str(samples_file)) == {"jobs": [], "num_known": 2}
    listed = document(cell, "jobs")["data"]
    assert (
        listed[0]["job_id"]
        == job["job_id"]
        == document(cell, "jobs", "show", job["job_id"])["job_id"]
    )
    shown = reverie(cell, "jobs", "show", job["job_id"]).stdout
    assert "4 steps" in shown and f"{job['loss_history'][0]:.3f}" in shown
    assert reverie(cell, "jobs", "show", "job-none").returncode == 1


def test_what_the_server_refuses_is_said_of_the_line(cell: RunningCell, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    good = json.dumps({"context": "a", "continuation": " b"})
    path.write_text(f"{good}\n\n" + json.dumps({"context_ids": [1], "continuation_ids": [10**7]}))
    done = reverie(cell, "train", str(path))
    assert done.returncode == 1 and "line 3" in done.stderr, done.stderr


def test_a_bar_is_shown_at_a_terminal_and_nowhere_else(
    cell: RunningCell, samples_file: Path
) -> None:
    done = reverie(cell, "train", str(samples_file), "--lr", "1e-6")
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
    again = samples_file.read_text().replace("command-", "terminal-")
    samples_file.write_text(again)
    command = [*COMMAND, "train", str(samples_file), "--lr", "1e-6"]
    with at_terminal(command, environment(cell) | {"NO_COLOR": "1"}) as terminal:
        assert terminal.wait() == 0, terminal.shown()
    assert re.search(r"job-\w+ .*\d/2 .*loss \d", terminal.shown()), terminal.shown()
    assert not re.search(r"\x1b\[[\d;]*3\dm", terminal.raw), "NO_COLOR is not honoured"


def test_a_job_is_followed_and_cancelled(cell: RunningCell) -> None:
    sample = {"context": "One and one is", "continuation": " two.", "id": f"c-{time.time_ns()}"}
    body = {"samples": [sample], "config": {"epochs": 1000, "learning_rate": 1e-9}}
    job = httpx.post(f"{cell.base}/train", json=body, timeout=60).json()["job_id"]
    following = subprocess.Popen(
        [*COMMAND, "jobs", "follow", job, "--json"],
        env=environment(cell),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        time.sleep(2)
        assert following.poll() is None, "it did not follow"
        document(cell, "jobs", "cancel", job)
        out, error = following.communicate(timeout=120)
    finally:
        following.kill()
    assert following.returncode == 1 and f"{job} is cancelled" in error
    # The document is that of the job; how the command ended is told by its code.
    assert json.loads(out)["status"] == "cancelled"


def test_checkpoints_are_saved_shown_and_verified(cell: RunningCell, samples_file: Path) -> None:
    document(cell, "train", str(samples_file), "--lr", "1e-6")
    made = document(cell, "checkpoints", "save", "--no-publish")
    shown = document(cell, "checkpoints", "show", str(made["generation"]))
    assert shown["learned"]["num_items"] >= 2
    listed = document(cell, "checkpoints")["data"]
    assert (
        listed == document(cell, "history")["data"] == document(cell, "checkpoints", "list")["data"]
    )
    assert listed[0]["generation"] == made["generation"] and not listed[0]["is_public"]
    assert document(cell, "checkpoints", "verify")["damaged_files"] == []
    assert reverie(cell, "rollback", "100000").returncode == 1


def test_status_and_candidates_are_for_people_and_programs(cell: RunningCell) -> None:
    assert document(cell, "status")["state"] == "ready"
    shown = reverie(cell, "status").stdout
    assert "smollm2-135m  ready" in shown and re.search(r"\ntrainer +\d+ +\d+  513 weights", shown)
    assert document(cell, "candidates", "list", "--state", "approved") == {"data": []}
    assert reverie(cell, "candidates", "show", "none").returncode == 1


def test_candidates_are_shown_side_by_side_and_decided(cell: RunningCell) -> None:
    def proposed() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = document(cell, "candidates", "list", "--state", "proposed")[
            "data"
        ]
        return found

    for question in QUESTIONS:
        ask(cell, question, "on")
    until(lambda: cell.get("/status")["dream"]["unscored"] == 0, lambda: cell.get("/status"))
    waiting = proposed()
    assert waiting, cell.get("/conversations")
    one = waiting[0]
    shown = reverie(cell, "candidates", "show", one["id"]).stdout
    assert f"system (instruction)  {BRIEF}" in shown
    assert re.search("as instructed .* without", shown)
    assert one["id"] in reverie(cell, "candidates").stdout
    (decided,) = document(cell, "candidates", "reject", one["id"])["data"]
    assert decided["state"] == "rejected"
    assert one["id"] not in {each["id"] for each in proposed()}
    again = reverie(cell, "candidates", "approve", one["id"])
    assert again.returncode == 1 and "rejected" in again.stderr, again.stderr


def test_the_doctor_s_arithmetic_is_what_the_cell_takes(cell: RunningCell) -> None:
    trainer = cell.get("/status")["trainer"]
    plan = make_plan(Settings(home=cell.home), has_gpu=False)
    shares = {each.what: each.size_bytes for each in plan.shares}
    assert shares["weights"] == trainer["weights_bytes"]
    assert shares["optimizer state"] + shares["projections"] == trainer["state_bytes"]
    found = document(cell, "doctor")
    assert found["is_well"] and found["memory"]["host_bytes"] == plan.total(False)
    levels = {each["check"]: each["level"] for each in found["findings"]}
    assert {levels[name] for name in ("vllm", "torch", "ray", "transformers")} == {"ok"}
    assert levels["door"] == levels["publication"] == "ok"


@pytest.mark.parametrize(
    ("setting", "check", "words"),
    [
        ("engine.kv_cache_bytes=4398046511104", "host memory", "needs 4"),
        ("device=cuda", "driver", "device=cuda"),
        ("host=0.0.0.0", "door", "public without keys"),
        ("model=/nowhere", "memory", "/nowhere"),
    ],
)
def test_the_doctor_finds_what_would_not_start(
    tmp_path: Path, setting: str, check: str, words: str
) -> None:
    if setting == "device=cuda" and Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    given = {"REVERIE_HOME": str(tmp_path), "REVERIE_PORT": str(free_port())}
    done = subprocess.run(
        [*COMMAND, "doctor", "--json", "--set", setting],
        env=os.environ | given,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    told = json.loads(done.stdout)
    (found,) = [each for each in told["findings"] if each["check"] == check]
    assert not told["is_well"] and found["level"] == "error"
    assert words in found["told"] and found["remedy"]


def test_an_experiment_runs_as_a_job_and_leaves_its_results_in_one_folder(
    cell: RunningCell,
) -> None:
    made = document(cell, "submit", "ingress_overhead", "--set", "rounds=1", "--set", "tokens=2")
    place = cell.home / "runs" / made["id"]
    assert made["state"] == "done" and made["directory"] == str(place)
    assert set(made["results"]) == {"ingress_overhead.json"}
    found = json.loads((place / "ingress_overhead.json").read_text())
    assert found["rows"][0]["streams"] == 1 and found["settings"]["tokens"] == 2
    assert made["settings"]["base"] == cell.base and made["settings"]["tokens"] == "2"
    assert made["versions"]["ray"] == "2.60.0" and made["versions"]["commit"]
    assert "streams" in (place / "log.txt").read_text()
    assert document(cell, "runs", "show", made["id"])["state"] == "done"
    assert made["id"] in reverie(cell, "logs").stdout


def test_a_run_that_fails_says_so_and_one_that_goes_on_is_stopped(cell: RunningCell) -> None:
    failed = reverie(cell, "submit", "crash_states", "--set", "states=many")
    assert failed.returncode == 1 and "invalid int value: 'many'" in failed.stdout
    started = document(cell, "submit", "crash_states", "--detach")
    assert started["state"] == "running"
    assert document(cell, "runs", "stop", started["id"])["state"] == "stopped"
    states = [each["state"] for each in document(cell, "runs")["data"]]
    assert states[:2] == ["stopped", "failed"]


def test_logs_of_every_role_are_found(cell: RunningCell) -> None:
    names = {each["name"].partition(".")[0] for each in document(cell, "logs")["data"]}
    assert set(CLASS_OF) <= names
    engine = document(cell, "logs", "engine", "--lines", "5")["data"]
    assert any(each["lines"] for each in engine)
    pid = cell.get("/status")["engine"]["pid"]
    assert all(each["path"].rpartition(".")[0].endswith(f"-{pid}") for each in engine)
    nobody = reverie(cell, "logs", "nobody")
    assert nobody.returncode == 1 and "trainer" in nobody.stderr


def whole_stream(base: str, has_begun: threading.Event) -> str:
    """A streamed answer of 600 tokens, and how many they were: some 40 s."""
    asked: dict[str, Any] = {"model": "smollm2-135m", "prompt": "Once", "stream": True}
    asked |= {"max_tokens": 600, "ignore_eos": True, "stream_options": {"include_usage": True}}
    text = ""
    with httpx.stream("POST", f"{base}/v1/completions", json=asked, timeout=300) as answer:
        for part in answer.iter_text():
            has_begun.set()
            text += part
    return text


def refusal(base: str, ending: "Future[Any]") -> httpx.Response | None:
    """What a new request is told while a cell ends, once it is told no."""
    while not ending.done():
        answer = httpx.post(f"{base}/v1/completions", json={"prompt": ""}, timeout=60)
        if answer.status_code == 503:
            return answer
        time.sleep(0.1)
    return None


def test_down_ends_a_cell_that_was_started_elsewhere_with_its_last_checkpoint(
    tmp_path: Path, model_dir: Path
) -> None:
    """And with its last answer: a stream that has begun ends whole, and nobody else is let in."""
    port = free_port()
    given = os.environ | {"REVERIE_HOME": str(tmp_path), "REVERIE_PORT": str(port)}
    up = [*COMMAND, "up", "--json", "--model", str(model_dir)]
    up += ["--set", "cell.drain_timeout_s=240"]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(
            up, env=given, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    one = RunningCell(f"http://127.0.0.1:{port}", tmp_path, started)
    try:
        one.wait_ready(BOOT_TIMEOUT_S)
        taught = {"context": "Down is", "continuation": " up."}
        job = one.train({"samples": [taught], "config": {"learning_rate": 1e-6}})
        has_begun = threading.Event()
        with ThreadPoolExecutor() as pool:
            streaming = pool.submit(whole_stream, one.base, has_begun)
            assert has_begun.wait(60)
            ending = pool.submit(document, one, "down", "--yes")
            refused = refusal(one.base, ending)
            assert not streaming.done(), "the stream was over before the cell began to stop"
            answer, ended = streaming.result(), ending.result()
        out, _ = started.communicate(timeout=STOP_TIMEOUT_S)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, (tmp_path / "log").read_text()
    assert json.loads(out)["base"] == one.base
    assert refused is not None and refused.headers["retry-after"] == "5"
    assert '"completion_tokens":600' in answer and "data: [DONE]" in answer
    assert ended["saved"] == f"generation 1 at version {job['weights_version']}"
    again = reverie(one, "down", "--yes")
    assert again.returncode == 3 and "no server answers" in again.stderr
