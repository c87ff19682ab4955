"""A step is bounded: in tokens and memory before it is queued, in time before it writes."""

import math
import mmap
import time
from typing import Any

import pytest
import torch

from actors.encoding import Encoder, size_check
from actors.errors import InvalidRequest
from actors.posted import TokenSample, TrainConfig
from actors.settings import TrainerSettings
from apollo.learning.budget import estimate_memory, measured_peak
from apollo.learning.samples import Example
from apollo.learning.step import Learner, StepTooLong
from tests.architectures import ARCHITECTURES, make_model

EXAMPLE = Example((1, 2, 3, 4, 5, 6, 7), (8, 9, 10, 11))
MIB = 2**20


def test_step_that_would_pass_its_deadline_is_given_up_before_it_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = Learner(make_model("llama"), rank=4)
    learner.step(EXAMPLE, 1e-3, deadline_s=60)
    before = {name: p.detach().clone() for name, p in learner.module.named_parameters()}
    num_steps = learner.optimizer.num_steps
    ticks = iter(range(0, 1000, 21))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    with pytest.raises(StepTooLong, match="took 21 s.*deadline of 60 s; nothing was changed"):
        learner.step(EXAMPLE, 1e-3, deadline_s=60)
    assert all(torch.equal(p, before[n]) for n, p in learner.module.named_parameters())
    assert learner.optimizer.num_steps == num_steps and not learner.optimizer.is_stepping
    assert math.isfinite(learner.step(EXAMPLE, 1e-3, deadline_s=64).loss)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_estimate_grows_with_what_is_in_the_graph_and_less_with_what_is_read(name: str) -> None:
    module = make_model(name)
    small = estimate_memory(module, 64, 0, False)
    assert estimate_memory(module, 128, 0, False).activations == 2 * small.activations
    read = estimate_memory(module, 64, 1024, False)
    assert read.activations == small.activations and read.prefix > 0
    assert read.total < estimate_memory(module, 64 + 1024, 0, False).total
    assert estimate_memory(module, 64, 1024, True).prefix < read.prefix
    assert estimate_memory(module, 64, 0, True).activations < small.activations
    assert small.total == sum((small.activations, small.logits, small.gradient, small.prefix))


def test_peak_is_measured_where_the_kernel_tells() -> None:
    with measured_peak(torch.device("cpu")) as peak:
        with mmap.mmap(-1, 64 * MIB) as taken:  # Not from what the allocator has kept.
            taken.write(b"1" * len(taken))
    assert not peak or 60 * MIB < peak[0] < 200 * MIB
    with pytest.raises(RuntimeError, match="inside"), measured_peak(torch.device("cpu")):
        raise RuntimeError("inside")


def test_every_sample_is_measured_against_the_limits_before_it_is_queued() -> None:
    asked: list[tuple[int, int]] = []

    def check(num_grad_tokens: int, num_read_tokens: int) -> None:
        asked.append((num_grad_tokens, num_read_tokens))
        raise InvalidRequest("too large")

    encoder = Encoder(None, 100, 64, check)
    plain = TokenSample(context_ids=[1] * 20, continuation_ids=[2] * 5)
    pair = plain.model_copy(update={"rejected_ids": [3] * 4})
    for sample, config in (
        (plain, TrainConfig(grad_context=8)),
        (plain, TrainConfig(grad_context=0)),
        (plain, TrainConfig()),
        (pair, TrainConfig(grad_context=8, objective="preference")),
    ):
        with pytest.raises(InvalidRequest, match=r"samples\[3\]: too large"):
            encoder.encode(sample, 3, config)
    assert asked == [(5 + 8, 12), (5 + 1, 19), (5 + 20, 0), (5 + 4 + 2 * 8, 12)]


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_step_tokens": 16}, "through 17 tokens and trainer.max_step_tokens is 16"),
        ({"max_step_bytes": 2**20}, "trainer.max_step_bytes is 1 MiB"),
    ],
)
def test_limits_are_named_with_their_remedy(limits: Any, says: str) -> None:
    learner = Learner(make_model("llama"), rank=4)
    check = size_check(learner.estimate, TrainerSettings(**limits))
    with pytest.raises(InvalidRequest, match=says + ".*shorten the continuation"):
        check(17, 10_000)
