"""One learning step on a small Llama with random weights."""

import math
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apollo.learning import stopwatch
from apollo.learning.samples import Example, truncate
from apollo.learning.step import Learner, NonFiniteLoss

EXAMPLE = Example((1, 2, 3, 4, 5), (6, 7, 8, 9))


def small_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(dtype)


def bits_of(learner: Learner) -> dict[str, bytes]:
    """Every weight, moment and counter."""
    optimizer = learner.optimizer
    tensors: dict[str, torch.Tensor] = dict(learner.module.named_parameters())
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{key}": value for key, value in state.items()}
    bits = {name: tensor.detach().float().numpy().tobytes() for name, tensor in tensors.items()}
    return bits | {"num_steps": str(optimizer.num_steps).encode()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_falls_and_every_parameter_but_the_embedding_moves(dtype: torch.dtype) -> None:
    module = small_llama(dtype)
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    addresses = {name: param.data_ptr() for name, param in module.named_parameters()}
    learner = Learner(module, rank=4, seed=1)
    reports = [learner.step(EXAMPLE, 3e-3) for _ in range(40)]
    assert reports[0].loss == pytest.approx(math.log(64), rel=0.3)
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert all(report.applied and report.skipped == () for report in reports)
    unmoved = {n for n, param in module.named_parameters() if torch.equal(param, before[n])}
    assert unmoved == {"model.embed_tokens.weight"}
    assert addresses == {name: param.data_ptr() for name, param in module.named_parameters()}
    assert all(param.grad is None for param in module.parameters())


def test_step_says_once_that_weights_will_change_and_before_they_do() -> None:
    learner = Learner(small_llama(), rank=4)
    before, said = bits_of(learner), []
    learner.step(EXAMPLE, 1e-3, before_writing=lambda: said.append(bits_of(learner)))
    assert said == [before] and bits_of(learner) != before
    with pytest.raises(NonFiniteLoss), torch.no_grad():
        learner.module.get_parameter("model.norm.weight").fill_(math.nan)
        learner.step(EXAMPLE, 1e-3, before_writing=lambda: said.append({}))
    assert len(said) == 1, "nothing was written"


def test_embeddings_are_trained_on_request() -> None:
    module = small_llama()
    before = module.model.embed_tokens.weight.detach().clone()
    Learner(module, rank=4, train_embeddings=True).step(EXAMPLE, 1e-3)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert not torch.equal(module.lm_head.weight, before)


@pytest.mark.parametrize("example", [EXAMPLE, Example((), (6, 7, 8, 9), weight=2.0)])
def test_loss_is_the_mean_over_the_predicted_continuation(example: Example) -> None:
    module = small_llama()
    ids = example.context_ids + example.continuation_ids
    with torch.no_grad():
        log_probs = module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    first = max(len(example.context_ids), 1)
    losses = [-log_probs[place - 1, ids[place]].item() for place in range(first, len(ids))]
    expected = example.weight * sum(losses) / len(losses)
    assert Learner(module, rank=4).step(example, 1e-3).loss == pytest.approx(expected, rel=1e-5)


def test_truncated_context_still_learns_the_whole_continuation() -> None:
    short = truncate(EXAMPLE, 6)
    assert short == Example((4, 5), EXAMPLE.continuation_ids)
    assert Learner(small_llama(), rank=4).step(short, 1e-3).applied


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_changes_no_bit(bad: float) -> None:
    module = small_llama()
    learner = Learner(module, rank=4)
    learner.step(EXAMPLE, 1e-3)
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[3, 3] = bad
    before = bits_of(learner)
    with pytest.raises(NonFiniteLoss, match="nothing was changed"):
        learner.step(EXAMPLE, 1e-3)
    assert bits_of(learner) == before
    assert all(param.grad is None for param in module.parameters())


def test_gradient_that_is_not_finite_leaves_its_tensor_untouched_and_is_named() -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    module = small_llama()
    learner = Learner(module, rank=4)
    learner.step(EXAMPLE, 1e-3)
    spoilt = module.get_parameter(name)
    handle = spoilt.register_hook(lambda grad: grad * math.inf)
    state = {key: value.clone() for key, value in learner.optimizer.state[spoilt].items()}
    before = {key: param.detach().clone() for key, param in module.named_parameters()}
    report = learner.step(EXAMPLE, 1e-3)
    assert report.skipped == (name,)
    assert report.applied
    unmoved = {key for key, param in module.named_parameters() if torch.equal(param, before[key])}
    assert unmoved == {name, "model.embed_tokens.weight"}
    assert all(torch.equal(learner.optimizer.state[spoilt][key], state[key]) for key in state)
    handle.remove()
    assert learner.step(EXAMPLE, 1e-3).skipped == ()


def test_step_in_which_every_gradient_is_bad_is_not_applied() -> None:
    module = small_llama()
    learner = Learner(module, rank=4)
    for param in learner.optimizer.param_groups[0]["params"]:
        param.register_hook(lambda grad: grad * math.nan)
    report = learner.step(EXAMPLE, 1e-3)
    assert not report.applied
    assert len(report.skipped) == len(list(module.named_parameters())) - 1


def test_two_runs_give_the_same_bits() -> None:
    def run() -> dict[str, Any]:
        learner = Learner(small_llama(torch.bfloat16), rank=4, seed=5, update_proj_gap=3)
        for step in range(8):
            learner.step(Example((1, 2), (3 + step, 4, 5)), 1e-3)
        return bits_of(learner)

    assert run() == run()


@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_a_step_that_rests_gives_the_same_bits_and_says_how_long_it_stood(
    checkpoint_layers: bool,
) -> None:
    rests: list[float] = []

    def breathe() -> float:
        rests.append(1000.0)
        return 1000.0

    given: dict[str, Any] = {"rank": 4, "seed": 5, "checkpoint_layers": checkpoint_layers}
    plain, resting = (
        Learner(small_llama(), **given),
        Learner(small_llama(), breathe=breathe, **given),
    )
    for step in range(3):
        example = Example((1, 2), (3 + step, 4, 5))
        rests.clear()
        assert plain.step(example, 1e-3).rested_s == 0
        # The deadline is for what is computed.
        report = resting.step(example, 1e-3, deadline_s=2000)
        assert report.rested_s == sum(rests)
        assert len(rests) >= len(report.tensors) + 2, "after each tensor, and before each layer"
    assert bits_of(plain) == bits_of(resting)


def test_a_step_says_what_its_time_went_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by one whenever it is read."""
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(stopwatch, "time", clock)
    learner = Learner(small_llama(), rank=4)
    long = Example((*range(12),), (6, 7, 8, 9))
    report = learner.step(long, 1e-3)
    num_tensors, num_layers = len(report.tensors), 2
    assert report.parts == {
        "prefix": 1 + num_layers,
        "forward": 1 + num_layers,
        "backward": 1 + 2 * num_tensors,
        "optimizer": num_tensors + 1,
        "rested": 2 * num_layers + num_tensors,
    }
    assert "prefix" not in learner.step(Example((1,), (6, 7, 8, 9)), 1e-3).parts
    weight = learner.module.get_parameter("model.norm.weight")
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(math.nan)
    with pytest.raises(NonFiniteLoss):
        learner.step(long, 1e-3)
    with torch.no_grad():
        weight.copy_(kept)
    assert learner.step(long, 1e-3).parts == report.parts, "what was given up is not counted"


def test_close_leaves_an_ordinary_module() -> None:
    module = small_llama()
    learner = Learner(module, rank=4)
    learner.close()
    module(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert module.model.norm.weight.grad is not None
    assert learner.optimizer.num_steps == 0
