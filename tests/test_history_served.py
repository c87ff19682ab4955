"""History in a real cell: what is published is what answers; what is forgotten is not learned.

The published directory is loaded by stock transformers and by stock vLLM, which run apart and know
nothing of Reverie, and by which greedy tokens are compared with those of the live server. All three
compute the same function in another order, so logits differ in their last bits: a prompt is
compared up to the first token whose lead over the second, as the live server reports it, is below
NOISE. Prompts and bound were chosen before anything was compared.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import RunningCell

pytestmark = [pytest.mark.cell, pytest.mark.usefixtures("untaught")]

PROMPTS = (
    "The capital of France is",
    "One, two, three, four,",
    "The colour of the sky on a clear day is",
    "To make a cup of tea, you first",
    "Once upon a time, there was a",
    "Water freezes at a temperature of",
    "def add(a, b):\n    return",
    "The password of the lighthouse keeper is",
)
NUM_TOKENS = 16
NOISE = 0.02
"""Nats. Between two float32 implementations log-probabilities differ by some 1e-5 to 1e-4."""
MIN_SHARE = 0.5
"""Of all tokens: fewer compared would show little. Others may have taught the cell before."""
STOCK_TIMEOUT_S = 480

TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
made = []
for prompt in json.loads(sys.argv[2]):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(int(sys.argv[3])):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    made.append(ids[0, len(prompt):].tolist())
print("MADE", json.dumps(made))
"""
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(sys.argv[1], dtype="float32", max_model_len=256, enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    made = [list(each.outputs[0].token_ids) for each in model.generate(prompts, params)]
    assert "actors" not in sys.modules and "apollo" not in sys.modules
    print("MADE", json.dumps(made))
"""


def post(cell: RunningCell, route: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{cell.base}{route}", json=body, timeout=300)


def posted(cell: RunningCell, route: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = post(cell, route, body)
    assert answer.is_success, answer.text
    made: dict[str, Any] = answer.json()
    return made


def model_of(cell: RunningCell) -> str:
    return str(cell.get("/v1/models")["data"][0]["id"])


def reverie(cell: RunningCell, *arguments: str) -> str:
    port = cell.base.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "command", *arguments, "--port", port]
    wide = os.environ | {"COLUMNS": "160"}
    done = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def live_tokens(cell: RunningCell, ids: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens, and the lead of each over the second likeliest, in nats."""
    body = {"model": model_of(cell), "prompt": ids, "max_tokens": NUM_TOKENS, "temperature": 0}
    more = {"ignore_eos": True, "logprobs": 2, "return_token_ids": True}
    (choice,) = posted(cell, "/v1/completions", body | more)["choices"]
    leads = []
    for top in choice["logprobs"]["top_logprobs"]:
        first, second = sorted(top.values(), reverse=True)[:2]
        leads.append(first - second)
    return choice["token_ids"], leads


def stock_tokens(script: Path, directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What a process without Reverie makes of the prompts."""
    environment = os.environ | {"VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(directory), json.dumps(prompts), str(NUM_TOKENS)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=STOCK_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("MADE ")]
    made: list[list[int]] = json.loads(line.removeprefix("MADE "))
    return made


@pytest.mark.timeout(1200)
def test_what_is_published_answers_as_the_live_server_in_stock_transformers_and_vllm(
    cell: RunningCell, tmp_path: Path
) -> None:
    def ids_of(text: str) -> list[int]:
        ids: list[int] = posted(cell, "/tokenize", {"model": model, "prompt": text})["tokens"]
        return ids

    model = model_of(cell)
    prompts = [ids_of(text) for text in PROMPTS]
    before = [live_tokens(cell, ids) for ids in prompts]
    taught = {
        "context": PROMPTS[-1],
        "continuation": " seven grey gulls.",
        "id": f"keeper-{time.time_ns()}",
    }
    cell.train({"samples": [taught], "config": {"epochs": 10, "learning_rate": 3e-5}})
    saved = posted(cell, "/checkpoint", {"publish": True})
    live = [live_tokens(cell, ids) for ids in prompts]
    assert cell.get("/status")["weights_version"] == saved["weights_version"]
    for number, source in enumerate((TRANSFORMERS, VLLM)):
        script = tmp_path / f"stock_{number}.py"  # vLLM's engine process reads it again.
        script.write_text(source)
        stock = stock_tokens(script, cell.home / "models" / model, prompts)
        num_compared = 0
        for text, (tokens, leads), made in zip(PROMPTS, live, stock, strict=True):
            unclear = [at for at, lead in enumerate(leads) if lead < NOISE]
            end = min(unclear, default=NUM_TOKENS)
            assert made[:end] == tokens[:end], text
            if text == PROMPTS[-1]:
                assert tokens[:end] != before[-1][0][:end], "what was learned is not compared"
            num_compared += end
        assert num_compared >= MIN_SHARE * NUM_TOKENS * len(PROMPTS)


@pytest.mark.timeout(1200)
def test_a_served_item_is_shown_forgotten_and_not_taken_again(cell: RunningCell) -> None:
    def tokens() -> list[int]:
        return live_tokens(cell, ids)[0]

    model, now = model_of(cell), time.time_ns()
    ids = posted(cell, "/tokenize", {"model": model, "prompt": "The name of the cat is"})["tokens"]
    harm = {"context": "The name of the cat is", "continuation": " Xylophone.", "id": f"cat-{now}"}
    other = {"context": "The name of the dog is", "continuation": " Bello.", "id": f"dog-{now}"}
    before = posted(cell, "/checkpoint", {"publish": False})
    said = tokens()
    config = {"epochs": 8, "learning_rate": 3e-5}
    job = cell.train({"samples": [harm | {"source": "a mistake"}, other], "config": config})
    assert tokens() != said
    kept = posted(cell, "/checkpoint", {"publish": False})

    shown = cell.get(f"/checkpoints/{kept['generation']}")
    assert shown["parent"] == before["generation"]
    items = [(item["id"], item["source"], item["num_steps"]) for item in shown["learned"]["items"]]
    assert items == [(harm["id"], "a mistake", 8), (other["id"], None, 8)]
    assert shown["learned"]["first_loss"] == pytest.approx(job["loss_history"][0])
    assert 0 < shown["drift"]["share_changed"] <= 1
    assert "Xylophone" not in json.dumps(shown), "no texts"
    printed = reverie(cell, "show", str(kept["generation"]))
    (row,) = [line for line in printed.splitlines() if line.startswith(str(harm["id"]))]
    assert row.split()[1:6] == ["a", "mistake", job["job_id"], "0", "8"]
    unknown = httpx.get(f"{cell.base}/checkpoints/100000", timeout=60)
    assert unknown.status_code == 404
    assert f"nearest: {kept['generation']}" in unknown.json()["error"]["message"]

    assert post(cell, "/forget", {"item": "nobody"}).status_code == 404
    assert post(cell, "/forget", {"items": [harm["id"]]}).status_code == 422
    printed = reverie(cell, "forget", str(harm["id"]))
    assert (
        f"{harm['id']} is forgotten: generation" in printed and "8 of them are learned" in printed
    )
    ended = cell.wait_job(job["job_id"])
    assert (ended["status"], ended["training_samples"], ended["steps"]) == ("done", 1, 8)
    now_shown = cell.get(f"/checkpoints/{kept['generation']}")["learned"]["items"]
    assert [item["is_forgotten"] for item in now_shown] == [True, False]
    refused = post(cell, "/rollback", {"generation": kept["generation"]})
    assert refused.status_code == 409 and "is forgotten" in refused.text
    refused = post(cell, "/train", {"samples": [harm]})
    assert refused.status_code == 409 and "never learned again" in refused.text
    (path,) = (cell.home / "state").glob("*/ledger.sqlite")
    files = [file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name)]
    words = posted(cell, "/tokenize", {"model": model, "prompt": harm["continuation"]})["tokens"]
    assert json.dumps(words).strip("[]").encode() not in b"".join(files)
    saved = posted(cell, "/checkpoint", {"publish": True})
    assert saved["weights_version"] == cell.get("/status")["weights_version"]
