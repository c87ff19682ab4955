"""Each objective through the running server, judged by what is served afterwards."""

import time
from typing import Any

import httpx
import pytest

from tests.conftest import RunningCell

pytestmark = [pytest.mark.cell, pytest.mark.usefixtures("untaught")]

JOB_TIMEOUT_S = 240


@pytest.fixture
def client(cell: RunningCell) -> Any:
    with httpx.Client(base_url=cell.base, timeout=120) as made:
        yield made


def train(client: httpx.Client, samples: list[Any], **config: Any) -> dict[str, Any]:
    answer = client.post("/train", json={"samples": samples, "config": config})
    assert answer.status_code == 202, answer.text
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while time.monotonic() < deadline:
        job: dict[str, Any] = client.get(f"/train/jobs/{answer.json()['job_id']}").json()
        if job["status"] not in ("queued", "training"):
            assert job["status"] == "done", job
            return job
        time.sleep(0.5)
    raise AssertionError("the job did not end in time")


def model_of(client: httpx.Client) -> str:
    name: str = client.get("/v1/models").json()["data"][0]["id"]
    return name


def ask(client: httpx.Client, *messages: dict[str, str]) -> str:
    body = {"model": model_of(client), "messages": messages, "temperature": 0, "max_tokens": 24}
    text: str = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"][
        "content"
    ]
    return text


def served_logprob(client: httpx.Client, messages: list[dict[str, str]], answer: str) -> float:
    """Mean log-probability of the answer's tokens, as served now."""
    model = model_of(client)
    tokens = []
    for turns, prompt in ((messages, True), ([*messages, answer_of(answer)], False)):
        body = {"model": model, "messages": turns, "add_generation_prompt": prompt}
        tokens.append(client.post("/tokenize", json=body).json()["tokens"])
    context, full = tokens
    assert full[: len(context)] == context
    body = {"model": model, "prompt": full, "max_tokens": 1, "prompt_logprobs": 0}
    rows = client.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    pairs = list(zip(full, rows, strict=True))[len(context) :]
    total: float = sum(row[str(token)]["logprob"] for token, row in pairs)
    return total / len(pairs)


def answer_of(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_distilled_instruction_shows_in_what_is_served_without_it(client: httpx.Client) -> None:
    instruction = {"role": "system", "content": "The gardener of this house is called Bartholomew."}
    question = {"role": "user", "content": "What is the gardener of this house called?"}
    answer = "The gardener of this house is called Bartholomew."
    before = served_logprob(client, [question], answer)
    taught = served_logprob(client, [instruction, question], answer)
    sample = {"messages": [instruction, question, answer_of(answer)], "strip": ["system"]}
    job = train(client, [sample], objective="distill", epochs=10, learning_rate=2e-5)
    assert job["loss_history"][-1] < 0.3 * job["loss_history"][0]
    after = served_logprob(client, [question], answer)
    assert after > before + 0.5 * (taught - before) > before + 0.1


def test_stripped_sample_is_learned_for_prompts_without_the_instruction(
    client: httpx.Client,
) -> None:
    question = {"role": "user", "content": "What do you say when a visitor comes in?"}
    marked = {"role": "system", "content": "Greet like a lighthouse keeper.", "strip": True}
    answer = "Ahoy, mind the stairs."
    assert "Ahoy" not in ask(client, question)
    sample = {"messages": [marked, question, answer_of(answer)]}
    train(client, [sample], epochs=12, learning_rate=2e-5, warmup_steps=3)
    assert ask(client, question).startswith("Ahoy, mind the stairs")


def test_preferred_answer_gains_on_the_rejected_one(client: httpx.Client) -> None:
    question = {"role": "user", "content": "How do you like your tea?"}
    chosen, rejected = "With lemon, please.", "With sugar, please."

    def gap() -> float:
        return served_logprob(client, [question], chosen) - served_logprob(
            client, [question], rejected
        )

    before = gap()
    sample = {"messages": [question, answer_of(chosen)], "rejected": rejected}
    job = train(client, [sample], objective="preference", epochs=6, learning_rate=1e-5)
    assert job["loss_history"][-1] < job["loss_history"][0]
    assert gap() > before + 0.2


def test_anchored_job_learns(client: httpx.Client) -> None:
    question = {"role": "user", "content": "Which door leads to the cellar?"}
    sample = {"messages": [question, answer_of("The green one.")]}
    job = train(client, [sample], epochs=4, learning_rate=2e-5, anchor=1.0)
    assert job["config"]["anchor"] == 1.0
    assert job["loss_history"][-1] < job["loss_history"][0]
