"""The real thing: one vLLM engine over the default model, and its memory opened from outside.

The engine runs in a process of its own, as it does in a cell but without Ray; this process plays
the trainer: it maps the same file, reads every tensor and changes some.
"""

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from actors import run_dir
from actors.messages import CellPaths
from actors.versions import VersionCounter
from apollo.weights.attach import attach
from apollo.weights.layout import WeightLayout
from apollo.weights.memory import Mapping

ROOT = Path(__file__).parents[1]
PROMPT = "The capital of France is"
NUM_TOKENS = 6
EXIT_TIMEOUT_S = 30

HOST = """
import asyncio, json, sys
from dataclasses import asdict
from actors.engine import Engine
from actors.messages import CellPaths
from actors.settings import Settings

async def main():
    engine = Engine(Settings.from_pairs({"engine.max_model_len": 256, "engine.max_num_seqs": 4,
        "engine.kv_cache_bytes": 2**26}), CellPaths(*sys.argv[1:]))
    print("REPORT", json.dumps(asdict(await engine.start())), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print("DIGEST", await engine.digest(line.strip()), flush=True)
    await engine.stop()

if __name__ == "__main__":
    asyncio.run(main())
"""


@dataclass
class RunningEngine:
    """The engine's process, and what it shares."""

    process: subprocess.Popen[str]
    paths: CellPaths
    report: dict[str, Any]
    layout: WeightLayout
    log: Path

    def digest(self, name: str) -> str:
        """As the engine computes it, in its own process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return answer_of(self.process.stdout, "DIGEST", self.log)

    def complete(self) -> str:
        """A greedy completion through vLLM's own application."""
        transport = httpx.HTTPTransport(uds=self.paths.socket)
        with httpx.Client(transport=transport, timeout=60) as client:
            model = Path(self.paths.model_dir).name
            body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": NUM_TOKENS}
            answer = client.post("http://engine/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])


def answer_of(lines: IO[str], word: str, log: Path) -> str:
    for line in lines:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise AssertionError(f"the engine ended:\n{log.read_text()}")


@pytest.fixture(scope="module")
def engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    paths = CellPaths(str(model_dir), run_dir.create(), "")
    VersionCounter.create(paths.versions)
    log = tmp_path_factory.mktemp("engine") / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", HOST, paths.model_dir, paths.run_dir, paths.ledger],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
    )
    try:
        assert process.stdout is not None
        report = json.loads(answer_of(process.stdout, "REPORT", log))
        layout = WeightLayout.load(Path(paths.layout))
        yield RunningEngine(process, paths, report, layout, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        run_dir.remove(Path(paths.run_dir))


def sha256(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def written(tensor: torch.Tensor, value: torch.Tensor) -> Iterator[None]:
    """Change a live tensor in place, and put back what was there."""
    before = tensor.clone()
    tensor.copy_(value)
    try:
        yield
    finally:
        tensor.copy_(before)


def test_every_tensor_of_the_checkpoint_is_mapped(engine: RunningEngine) -> None:
    assert len(engine.layout) == 272
    assert engine.layout.size_bytes == 538_060_032
    assert engine.layout.padding_bytes == 0
    assert {view.dtype for view in engine.layout} == {"float32"}
    assert Path(engine.paths.progress).read_text().split() == ["weights", "layout", "engine"]
    assert engine.report["is_healthy"] and engine.report["reason"] is None


def test_files_are_private(engine: RunningEngine) -> None:
    for path in (engine.paths.weights, engine.paths.socket):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.stat(engine.paths.weights).st_size < engine.layout.size_bytes + 272 * 256


def test_every_view_is_bit_equal_to_the_checkpoint(engine: RunningEngine, model_dir: Path) -> None:
    stored = load_file(model_dir / "model.safetensors")
    live = Mapping(engine.layout, is_writable=False).tensors()
    assert live.keys() == stored.keys()
    for name, tensor in stored.items():
        assert live[name].shape == tensor.shape, name
        assert torch.equal(live[name].view(torch.int32), tensor.view(torch.int32)), name


def test_engine_computes_with_the_mapped_memory(engine: RunningEngine) -> None:
    live = Mapping(engine.layout, is_writable=False).tensors()
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert engine.digest(name) == sha256(live[name]), name
    layer = "model.layers.7."
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    parts = [live[f"{attention}{part}_proj.weight"] for part in "qkv"]
    assert engine.digest(f"{attention}qkv_proj.weight") == sha256(*parts)
    parts = [live[f"{mlp}{part}_proj.weight"] for part in ("gate", "up")]
    assert engine.digest(f"{mlp}gate_up_proj.weight") == sha256(*parts)


def test_one_written_element_is_seen_by_the_engine(engine: RunningEngine) -> None:
    norm = Mapping(engine.layout, is_writable=True).tensors()["model.norm.weight"]
    before = engine.digest("model.norm.weight")
    changed = norm.clone()
    changed[5] += 1.0
    with written(norm, changed):
        assert engine.digest("model.norm.weight") == sha256(changed) != before
    assert engine.digest("model.norm.weight") == before


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.29.self_attn.v_proj.weight",
        "model.layers.29.mlp.down_proj.weight",
        "model.layers.15.mlp.up_proj.weight",
    ],
)
def test_answer_changes_with_the_memory_and_comes_back(engine: RunningEngine, name: str) -> None:
    tensor = Mapping(engine.layout, is_writable=True).tensors()[name]
    before = engine.complete()
    assert before.strip()
    with written(tensor, tensor * -3):
        assert engine.complete() != before
    assert engine.complete() == before


def test_trainers_module_over_the_same_memory_answers_the_same(
    engine: RunningEngine, model_dir: Path
) -> None:
    module: Any = attach(engine.layout, model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        answer = module.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False)[0]
    text = tokenizer.decode(answer[ids["input_ids"].shape[1] :])
    assert text == engine.complete()
    head = module.get_parameter("lm_head.weight")
    assert head is module.get_parameter("model.embed_tokens.weight")
    with torch.no_grad(), written(head, head * -3):
        assert engine.digest("model.embed_tokens.weight") == sha256(head.detach())


def test_clean_stop_leaves_no_process_and_no_file(engine: RunningEngine) -> None:
    family = [psutil.Process(pid) for pid in engine.report["child_pids"]]
    files = Path(engine.paths.vllm_files).read_text().split()
    assert family and files and all(Path(path).exists() for path in files)
    assert engine.process.stdin is not None
    engine.process.stdin.close()
    assert engine.process.wait(EXIT_TIMEOUT_S) == 0, engine.log.read_text()
    _, left = psutil.wait_procs(family, EXIT_TIMEOUT_S)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    assert not [path for path in files if Path(path).exists()]
    run_dir.remove(Path(engine.paths.run_dir))
    assert not Path(engine.paths.run_dir).exists()
