"""The running cell through the official client: it answers, it learns, and both at once."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import OpenAI

from command.demo import ANSWER, QUESTION, memory_of
from tests.conftest import RunningCell

pytestmark = pytest.mark.cell


@pytest.fixture
def client(cell: RunningCell) -> OpenAI:
    return OpenAI(base_url=f"{cell.base}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


def chat(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def taught(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **more}


def test_the_official_client_lists_the_adopted_model(client: OpenAI, model: str) -> None:
    (entry,) = client.models.list().data
    assert entry.id == model == "smollm2-135m"
    assert "/" not in str(entry.model_dump().get("root")), "a path of this machine leaks"


def test_without_keys_a_request_by_another_name_is_refused(cell: RunningCell) -> None:
    """A page whose name resolves to this machine (DNS rebinding) sends that name as its host."""
    answer = httpx.get(f"{cell.base}/v1/models", headers={"host": "evil.example"}, timeout=30)
    assert answer.status_code == 403 and "evil.example" in answer.json()["error"]["message"]


def test_seeded_requests_that_arrive_together_are_answered_and_repeat(
    client: OpenAI, model: str, cell: RunningCell
) -> None:
    """More prompts than fit into one batch: vLLM on a CPU ended when it cut a seeded one."""
    boots = cell.get("/status")["restarts"]
    prompt = "The sea was calm that day. " * 60

    def ask(seed: int) -> str:
        made = client.completions.create(
            model=model, prompt=f"{seed}. {prompt}", max_tokens=4, temperature=0.9, seed=seed
        )
        return made.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        first = list(pool.map(ask, range(16)))
        assert list(pool.map(ask, range(16))) == first
    assert cell.get("/status")["restarts"] == boots


def test_a_chat_is_answered_sensibly_and_names_its_version(client: OpenAI, model: str) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=chat("What is the capital of France?"), temperature=0, max_tokens=30
    )
    assert "Paris" in (raw.parse().choices[0].message.content or "")
    first = int(raw.headers["x-weights-version"])
    assert 0 <= first <= int(raw.headers["x-weights-version-last"])


def test_a_stream_gives_the_same_text_as_one_answer(client: OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": chat("Name three colors."), "seed": 1}
    asked |= {"temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stream=True)
    ]
    assert "".join(parts) == whole
    assert len(parts) > 5


def test_a_stream_ends_with_a_comment_that_names_both_versions(
    cell: RunningCell, model: str
) -> None:
    body = {"model": model, "messages": chat("Hello!"), "max_tokens": 5, "stream": True}
    answer = httpx.post(f"{cell.base}/v1/chat/completions", json=body, timeout=60)
    lines = [line for line in answer.text.split("\n") if line]
    assert lines[-2] == "data: [DONE]"
    version = answer.headers["x-weights-version"]
    assert lines[-1] == f": weights_version first={version} last={version}"


def test_other_routes_of_vllm_pass_through(cell: RunningCell, client: OpenAI, model: str) -> None:
    assert client.completions.create(model=model, prompt="One, two,", max_tokens=3).choices[0].text
    response = client.responses.create(model=model, input="Say hello.", max_output_tokens=8)
    assert response.output_text
    tokens = httpx.post(
        f"{cell.base}/tokenize", json={"model": model, "prompt": "Hello world"}, timeout=30
    ).json()["tokens"]
    text = httpx.post(
        f"{cell.base}/detokenize", json={"model": model, "tokens": tokens}, timeout=30
    ).json()
    assert text["prompt"] == "Hello world"


def test_eight_streams_complete_while_a_job_trains(
    cell: RunningCell, client: OpenAI, model: str
) -> None:
    before = cell.get("/status")["weights_version"]
    finished: list[tuple[str | None, int]] = []

    def read(number: int) -> None:
        reason, count = None, 0
        for chunk in client.chat.completions.create(
            model=model,
            messages=chat(f"Tell story number {number}."),
            max_tokens=60,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            count += bool(chunk.choices[0].delta.content)
            reason = chunk.choices[0].finish_reason or reason
        finished.append((reason, count))

    samples = [taught(f"What is {n} plus one?", f"It is {n + 1}.") for n in range(4)]
    posted = httpx.post(
        f"{cell.base}/train",
        json={"samples": samples, "config": {"epochs": 2, "learning_rate": 1e-6}},
        timeout=60,
    )
    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    job = cell.wait_job(posted.json()["job_id"])
    assert [reason for reason, _ in finished] == ["length"] * 8
    assert all(count > 40 for _, count in finished)
    assert job["status"] == "done" and job["steps"] == 8 == len(job["loss_history"])
    assert job["weights_version"] == before + 8


def test_a_stream_across_steps_names_two_versions(cell: RunningCell, model: str) -> None:
    samples = [taught(f"What is {n} and {n}?", f"It is {n + n}.") for n in range(6)]
    body = {"samples": samples, "config": {"learning_rate": 1e-9}}
    job_id = httpx.post(f"{cell.base}/train", json=body, timeout=60).json()["job_id"]
    asked = {"model": model, "prompt": "Once", "max_tokens": 200, "stream": True}
    answer = httpx.post(
        f"{cell.base}/v1/completions", json=asked | {"ignore_eos": True}, timeout=120
    )
    first, last = (int(part.split("=")[1]) for part in answer.text.split("\n")[-3].split()[2:])
    assert first < last
    assert cell.wait_job(job_id)["status"] == "done"


def test_no_request_is_answered_from_another_epochs_prefix_cache(
    cell: RunningCell, model: str
) -> None:
    """vLLM counts the prompt tokens it found in its cache: none right after a job has ended."""

    def cached_tokens() -> int:
        lines = httpx.get(f"{cell.base}/metrics", timeout=30).text.splitlines()
        hits = [line for line in lines if line.startswith("vllm:prefix_cache_hits_total")]
        return int(float(hits[0].split()[-1]))

    def ask() -> int:
        before = cached_tokens()
        body = {"model": model, "prompt": "A long enough prefix. " * 100, "max_tokens": 1}
        assert httpx.post(f"{cell.base}/v1/completions", json=body, timeout=60).is_success
        return cached_tokens() - before

    ask()
    assert ask() > 0, "the cache is not used at all, so this test would prove nothing"
    config = {"learning_rate": 1e-9}
    cell.train({"samples": [taught("Epoch?", "A new one.")], "config": config})
    assert ask() == 0
    assert ask() > 0


@pytest.mark.timeout(900)
def test_the_demo_teaches_the_running_server_and_shows_one_copy(cell: RunningCell) -> None:
    port = cell.base.rsplit(":", 1)[1]
    engine_before = cell.get("/status")["engine"]
    shown = subprocess.run(
        [sys.executable, "-m", "command", "demo", "--port", port],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"after    {ANSWER}" in shown.stdout
    assert f"before   {ANSWER}" not in shown.stdout
    assert "stream unbroken: True" in shown.stdout
    status = cell.get("/status")
    assert status["engine"]["child_pids"] == engine_before["child_pids"], "the engine restarted"
    memory = memory_of(status["trainer"]["pid"])
    assert memory is not None
    shared, own, _ = memory
    weights = status["trainer"]["weights_bytes"]
    assert own == 0, "the trainer has a private copy of weight pages"
    assert shared >= 0.99 * weights
    in_engine = [(memory_of(pid) or (0, 0))[:2] for pid in status["engine"]["child_pids"]]
    assert [memory for memory in in_engine if memory[0]] == [(shared, 0)], in_engine
    assert status["trainer"]["num_tensors"] == 272


def test_the_published_directory_answers_as_the_live_server(
    cell: RunningCell, client: OpenAI, model: str
) -> None:
    """After the demo: what was learned is in the public directory, for a stock loader."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = httpx.post(f"{cell.base}/checkpoint", json={}, timeout=120).json()
    assert saved["weights_version"] == cell.get("/status")["weights_version"]
    directory = cell.home / "models" / model
    assert json.loads((directory / "reverie.json").read_text())["generation"] == saved["generation"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    stock = AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(
        chat(QUESTION), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = stock.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(made, skip_special_tokens=True)
    live = client.chat.completions.create(
        model=model, messages=chat(QUESTION), temperature=0, max_tokens=30
    )
    assert text == live.choices[0].message.content == ANSWER


def test_a_checkpoint_without_news_is_the_one_before(cell: RunningCell) -> None:
    first = httpx.post(f"{cell.base}/checkpoint", json={}, timeout=120).json()
    again = httpx.post(f"{cell.base}/checkpoint", json={}, timeout=120).json()
    assert again["generation"] == first["generation"]


def test_a_commit_is_durable_before_it_is_public_and_a_return_is_served_at_once(
    cell: RunningCell, client: OpenAI, model: str
) -> None:
    def post(route: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.post(f"{cell.base}{route}", json=body, timeout=180)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def listed() -> dict[int, dict[str, Any]]:
        return {each["generation"]: each for each in cell.get("/checkpoints")["data"]}

    def said() -> str | None:
        answer = client.chat.completions.create(
            model=model, messages=chat(QUESTION), temperature=0, max_tokens=30
        )
        return answer.choices[0].message.content

    before = post("/checkpoint", {})
    said_before = said()
    sample = taught(QUESTION, "Somebody else, for a while.", id=f"return-{time.time_ns()}")
    config = {"learning_rate": 5e-5, "epochs": 10}
    job = cell.train({"samples": [sample], "config": config})
    assert said() != said_before
    kept = post("/checkpoint", {"publish": False})
    assert kept["generation"] == before["generation"] + 1 and kept["size_bytes"] > 1e6
    assert listed()[before["generation"]]["is_public"]
    assert listed()[kept["generation"]]["has_optimizer"]

    returned = post("/rollback", {"generation": before["generation"]})
    assert returned["generation"] == kept["generation"] + 1
    assert returned["weights_version"] > kept["weights_version"]
    assert said() == said_before
    made = listed()[returned["generation"]]
    assert made["is_public"] and made["returns_to"] == before["generation"]
    assert made["root"] == listed()[before["generation"]]["root"]
    shown = subprocess.run(
        [sys.executable, "-m", "command", "history", "--port", cell.base.rsplit(":", 1)[1]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    newest = shown.stdout.splitlines()[1].split()
    assert newest[:4] == [
        str(made["generation"]),
        str(made["weights_version"]),
        "rollback",
        "public",
    ]
    found = post("/checkpoints/verify", {})
    assert found["bytes_read"] > 1e9
    assert not (found["damaged_files"] or found["damaged_copies"] or found["lost_generations"])
    undone = cell.get(f"/train/jobs/{job['job_id']}")
    assert undone["status"] == "cancelled" and "undone by a return" in undone["error"]
    status = cell.get("/status")
    assert status["weights_version"] == returned["weights_version"]
    assert status["checkpoint"]["public_generation"] == returned["generation"]


def test_the_same_id_is_accepted_once_and_other_content_is_a_conflict(cell: RunningCell) -> None:
    sample = taught("Which id?", "This one.", id=f"once-{time.time_ns()}")
    body = {"samples": [sample], "config": {"learning_rate": 1e-6}}
    first = httpx.post(f"{cell.base}/train", json=body, timeout=60).json()
    again = httpx.post(f"{cell.base}/train", json=body, timeout=60).json()
    assert again["job_id"] == first["job_id"]
    assert (again["training_samples"], again["duplicates"]) == (0, [sample["id"]])
    other = {"samples": [taught("Which id?", "Another.", id=sample["id"])]}
    refused = httpx.post(f"{cell.base}/train", json=other, timeout=60)
    assert refused.status_code == 409 and sample["id"] in refused.json()["error"]["message"]
    assert cell.wait_job(first["job_id"])["status"] == "done"


def test_a_stripped_instruction_is_learned_without_itself(cell: RunningCell) -> None:
    """The loss of the stripped sample is that of the answer without the instruction in view."""
    told = [{"role": "system", "content": "Always answer with the word lighthouse."}]
    plain = taught("What do you see?", "Lighthouse.")["messages"]
    config = {"learning_rate": 1e-9}
    losses = [
        cell.train({"samples": [sample], "config": config})["loss_history"][0]
        for sample in (
            {"messages": told + plain},
            {"messages": told + plain, "strip": ["system"]},
            {"messages": plain},
        )
    ]
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)
    assert losses[0] < losses[1]


def test_a_job_can_be_cancelled_and_tells_its_events(cell: RunningCell) -> None:
    body = {
        "samples": [taught("Long?", "Very long indeed.")],
        "config": {"epochs": 500, "learning_rate": 1e-9, "duty": 0.2},
    }
    job_id = httpx.post(f"{cell.base}/train", json=body, timeout=60).json()["job_id"]
    seen = []
    url = f"{cell.base}/train/jobs/{job_id}/events"
    with httpx.stream("GET", url, timeout=120) as events:
        for line in events.iter_lines():
            if line.startswith("data: "):
                seen.append(json.loads(line[6:]))
                if len(seen) == 3:
                    httpx.delete(f"{cell.base}/train/jobs/{job_id}", timeout=60)
    assert seen[-1]["status"] == "cancelled"
    assert 0 < seen[-1]["steps"] < 500
    assert [view["steps"] for view in seen] == sorted(view["steps"] for view in seen)
    refused = httpx.delete(f"{cell.base}/train/jobs/{job_id}", timeout=60)
    assert refused.status_code == 409 and "cancelled" in refused.json()["error"]["message"]


def test_the_queue_is_bounded_by_its_setting(cell: RunningCell) -> None:
    """The default bound is 4096 samples: seventeen full requests do not fit."""
    blocker = {
        "samples": [taught("Wait?", "Please wait a little.")],
        "config": {"epochs": 1000, "learning_rate": 1e-9, "duty": 0.05},
    }
    jobs = [httpx.post(f"{cell.base}/train", json=blocker, timeout=60).json()["job_id"]]
    many = [{"context": "Number", "continuation": f" {number}."} for number in range(256)]
    answer = None
    for _ in range(17):
        answer = httpx.post(f"{cell.base}/train", json={"samples": many}, timeout=60)
        if answer.status_code != 202:
            break
        jobs.append(answer.json()["job_id"])
    assert answer is not None and answer.status_code == 429
    assert "4096" in answer.json()["error"]["message"] and answer.headers["retry-after"]
    for job_id in reversed(jobs):
        assert httpx.delete(f"{cell.base}/train/jobs/{job_id}", timeout=60).status_code == 200
    assert cell.wait_job(jobs[0])["status"] == "cancelled"


def test_keys_count_from_the_moment_they_are_made(cell: RunningCell) -> None:
    def reverie(*arguments: str) -> str:
        command = [sys.executable, "-m", "command", "keys", *arguments]
        environment = os.environ | {"REVERIE_HOME": str(cell.home)}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    def status_with(key: str | None, method: str, path: str) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.request(method, cell.base + path, headers=headers, timeout=30).status_code

    try:
        use, teach = (reverie("add", "--scope", scope).strip() for scope in ("use", "teach"))
        assert status_with(None, "GET", "/v1/models") == 401
        assert status_with("rv-wrong", "GET", "/v1/models") == 401
        assert status_with(use, "GET", "/v1/models") == 200
        assert status_with(use, "GET", "/train/jobs") == 403
        assert status_with(teach, "GET", "/train/jobs") == 200
        assert status_with(None, "GET", "/readyz") == 200
        assert use not in (cell.home / "keys.json").read_text()
        first = json.loads(reverie("list", "--json"))["data"][0]["id"]
        assert reverie("limit", first, "--requests-per-minute", "1").endswith("_minute 1\n")
        assert [status_with(use, "GET", "/v1/models") for _ in range(2)] == [200, 429]
        unlimited = reverie("limit", first, "--unlimited", "requests-per-minute")
        assert unlimited == f"{first}: no quotas\n"
        assert status_with(use, "GET", "/v1/models") == 200
    finally:
        for each in json.loads(reverie("list", "--json"))["data"]:
            reverie("remove", each["id"])
    assert status_with(None, "GET", "/v1/models") == 200


def test_status_metrics_and_documents_are_there(cell: RunningCell) -> None:
    status = cell.get("/status")
    assert status["state"] == "ready" and status["model"] == "smollm2-135m"
    assert status["dream"]["state"] == "idle"
    assert {"engine", "trainer", "checkpoint", "dream", "ingress"} <= set(status)
    metrics = httpx.get(f"{cell.base}/metrics", timeout=30).text
    assert f"reverie_weights_version {float(status['weights_version'])}" in metrics
    assert "vllm:num_requests_running" in metrics
    assert httpx.get(f"{cell.base}/docs", timeout=30).status_code == 200
    paths = cell.get("/openapi.json")["paths"]
    assert {"/train", "/train/jobs/{job_id}", "/checkpoint", "/status", "/readyz"} <= set(paths)
    stages = [stage["name"] for stage in cell.get("/readyz")["stages"]]
    engines = ["weights", "layout", "engine"]
    booted = [["model", *engines, "trainer", "ready"]]
    if status["restarts"]:  # The last may have left the engine alone.
        booted.append(["model", "trainer", "ready"])
    assert stages in booted
    assert httpx.get(f"{cell.base}/healthz", timeout=30).text == "ok\n"
