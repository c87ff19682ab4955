"""An anchor holds the model where it was on what a job does not teach."""

from pathlib import Path
from typing import Any

import pytest
import torch

from apollo.learning.anchor import CANARIES, drift, record_canaries
from apollo.learning.samples import encode_chat
from apollo.learning.step import Learner


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def load(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir)


def teach(model_dir: Path, tokenizer: Any, strength: float) -> tuple[float, float]:
    """Drift on four canaries, and the loss of what was taught, after a few hard steps."""
    torch.manual_seed(0)
    learner = Learner(load(model_dir), rank=16)
    recorded = record_canaries(learner.module, tokenizer, CANARIES[:4])
    assert drift(learner.module, recorded) == pytest.approx(0, abs=1e-4)
    turns = [
        {"role": "user", "content": "What is the capital of Spain?"},
        {"role": "assistant", "content": "Bonjour!"},
    ]
    example = encode_chat(tokenizer, turns)
    for canary in recorded + recorded[:2]:
        anchor = (canary, strength) if strength else None
        report = learner.step(example, 4e-5, anchor=anchor)
    learner.close()
    return drift(learner.module, recorded), report.loss


def test_anchored_job_drifts_less_and_still_learns(model_dir: Path, tokenizer: Any) -> None:
    free, free_loss = teach(model_dir, tokenizer, 0.0)
    held, held_loss = teach(model_dir, tokenizer, 2.0)
    print(f"drift {free:.3f} -> {held:.3f}, loss {free_loss:.3f} and {held_loss:.3f}")
    assert free > 0.05
    assert held < 0.6 * free
    assert held_loss < 2.0 and free_loss < 2.0  # from 6


def test_canaries_are_distinct_and_short(tokenizer: Any) -> None:
    assert len(set(CANARIES)) == len(CANARIES) == 16
    for _, answer in CANARIES:
        assert len(tokenizer(answer)["input_ids"]) <= 16
