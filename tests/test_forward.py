"""A context that is only read gives the same logits as one that is learned, on every architecture.

Each way in which a stock cache goes wrong in training has a test that shows it going wrong.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

from apollo.learning import forward, loss
from apollo.learning.forward import (
    Reader,
    UnfaithfulPrefix,
    check_prefix,
    let_checkpointing_read,
)
from apollo.learning.loss import cross_entropy, distillation, gather_logprobs, odds_ratio_preference
from apollo.learning.prefix import UnsupportedLayer, freeze, read_prefix
from tests.architectures import ARCHITECTURES, VOCAB, make_model

IDS = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()
TOLERANCE = 1e-5
"""Of a log-probability, relative to the largest: float32 sums in another order."""


def full_logprobs(module: Any, ids: list[int], num_continuation: int) -> Tensor:
    logits = module(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits
    logprobs = logits[0, -num_continuation:].log_softmax(-1)
    found: Tensor = logprobs.gather(-1, torch.tensor(ids[-num_continuation:]).unsqueeze(-1))
    return found


def gradients(module: Any) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        scale = max(grad.abs().max().item(), 1e-2 * largest)
        assert (found[name] - grad).abs().max().item() <= relative * scale, name


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_continuation_after_a_read_context_equals_the_full_forward_in_training_mode(
    name: str, is_checkpointed: bool
) -> None:
    module = make_model(name)
    if is_checkpointed:
        let_checkpointing_read(module)
    assert module.training
    check_prefix(module)
    for num_continuation in (1, 4, 25, 50):
        expected = full_logprobs(module, IDS, num_continuation)
        split = len(IDS) - num_continuation
        reader = Reader(module, IDS[:split], 0, num_continuation)
        assert 0 < reader.num_read < split
        for _ in range(2):  # Reading it once more finds the same prefix.
            found = reader.logprobs(IDS[split:])
            scale = expected.abs().max().item()
            assert (found - expected).abs().max().item() < 4 * TOLERANCE * scale
        cross_entropy(found).backward()
        assert any(grad.abs().max() > 0 for grad in gradients(module).values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_context_in_the_graph_gives_the_gradient_of_ordinary_training(name: str) -> None:
    module = make_model(name)
    cross_entropy(full_logprobs(module, IDS, 8)).backward()
    expected = gradients(module)
    reader = Reader(module, IDS[:-8], len(IDS), 8)
    assert reader.num_read == 0
    cross_entropy(reader.logprobs(IDS[-8:])).backward()
    assert_close(gradients(module), expected, 1e-3)


def detached_gradient(module: Any, num_read: int, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Gradient of one full forward, without a cache, in which everything that a layer hands from
    the first tokens to later ones is detached: keys and values; of linear attention, what enters
    the convolution and the recurrence.
    """

    def cut(tensor: Tensor, axis: int) -> Tensor:
        read, learned = tensor.split([num_read, tensor.shape[axis] - num_read], axis)
        return torch.cat([read.detach(), learned], axis)

    name = module.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, gemma2.eager_attention_forward)

    def attend_detached(
        layer: Any, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any
    ) -> Any:
        return attend(layer, query, cut(key, 2), cut(value, 2), *a, **k)

    convolve, recur = qwen3_5.causal_conv1d_fn, qwen3_5.torch_chunk_gated_delta_rule

    def recur_detached(*qkv: Tensor, g: Tensor, beta: Tensor, **k: Any) -> Any:
        return recur(*(cut(part, 1) for part in qkv), g=cut(g, 1), beta=cut(beta, 1), **k)

    patch.setitem(ALL_ATTENTION_FUNCTIONS, name, attend_detached)
    patch.setattr(qwen3_5, "causal_conv1d_fn", lambda x, *a, **k: convolve(cut(x, 2), *a, **k))
    patch.setattr(qwen3_5, "torch_chunk_gated_delta_rule", recur_detached)
    cross_entropy(full_logprobs(module, IDS, 8)).backward()
    return gradients(module)


@pytest.mark.parametrize("grad_context", [0, 5, 20])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_of_a_suffix_is_that_of_a_full_forward_with_the_prefix_detached(
    name: str, grad_context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_model(name)
    reader = Reader(module, IDS[:-8], grad_context, 8)
    cross_entropy(reader.logprobs(IDS[-8:])).backward()
    found = gradients(module)
    assert reader.num_read == len(IDS) - 8 - max(1, grad_context)
    assert_close(found, detached_gradient(module, reader.num_read, monkeypatch), 1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3-windows", "qwen3.5-hybrid"])
def test_gradient_with_checkpointing_equals_the_one_without(name: str) -> None:
    found = []
    for is_checkpointed in (False, True):
        module = make_model(name)
        if is_checkpointed:
            let_checkpointing_read(module)
        cross_entropy(Reader(module, IDS[:-8], 4, 8).logprobs(IDS[-8:])).backward()
        found.append(gradients(module))
    assert_close(found[1], found[0], 1e-5)


def test_more_context_in_the_graph_comes_closer_to_the_full_gradient() -> None:
    module = make_model("qwen3")

    def gradient(grad_context: int) -> Tensor:
        cross_entropy(Reader(module, IDS[:-8], grad_context, 8).logprobs(IDS[-8:])).backward()
        return torch.cat([grad.flatten() for grad in gradients(module).values()])

    full = gradient(len(IDS))
    cosines = [
        torch.nn.functional.cosine_similarity(gradient(k), full, dim=0).item() for k in (0, 26, 51)
    ]
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] > 0.98


def test_several_continuations_share_one_prefix_and_do_not_see_each_other() -> None:
    module = make_model("qwen3.5-hybrid")
    reader = Reader(module, IDS[:40], 0, 6)
    first = reader.logprobs(IDS[40:50]).detach()
    reader.logprobs(IDS[54:60])
    assert torch.equal(reader.logprobs(IDS[40:50]).detach(), first)


# What stock parts do: each of these is what the code above avoids.


def stock_cache(module: Any, num_read: int) -> DynamicCache:
    cache = DynamicCache(config=module.config)
    with torch.no_grad():
        module.get_decoder()(
            input_ids=torch.tensor([IDS[:num_read]]), past_key_values=cache, use_cache=True
        )
    return cache


def test_trap_a_stock_cache_of_linear_attention_breaks_the_backward_pass() -> None:
    module = make_model("qwen3.5-hybrid")
    suffix = torch.tensor([IDS[40:]])
    logits = module(input_ids=suffix, past_key_values=stock_cache(module, 40)).logits
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()
    frozen = freeze(stock_cache(module, 40))
    module(input_ids=suffix, past_key_values=frozen).logits.sum().backward()


def test_trap_checkpointing_drops_a_cache_and_the_check_at_the_start_refuses_that() -> None:
    module = make_model("llama")
    suffix = torch.tensor([IDS[40:]])
    expected = module(input_ids=torch.tensor([IDS]), use_cache=False).logits[:, 40:]
    prefix = read_prefix(module, torch.tensor([IDS[:40]]))
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:  # Some versions of transformers fail over the mask, some go on without the context.
        dropped = module(input_ids=suffix, past_key_values=prefix).logits
        assert (dropped - expected).abs().max() > 0.1
    except RuntimeError as error:
        assert "must match the size" in str(error)
    with pytest.raises(UnfaithfulPrefix, match="full_attention"):
        check_prefix(module)
    let_checkpointing_read(module)
    kept = module(input_ids=suffix, past_key_values=prefix).logits
    assert (kept - expected).abs().max() < 1e-4


def test_trap_a_stock_cache_grows_with_every_suffix() -> None:
    module = make_model("llama")
    suffix = torch.tensor([IDS[40:]])
    stock, frozen = stock_cache(module, 40), freeze(stock_cache(module, 40))
    twice = [
        [module(input_ids=suffix, past_key_values=cache).logits for _ in range(2)]
        for cache in (stock, frozen)
    ]
    assert not torch.allclose(twice[0][0], twice[0][1], atol=1e-3)
    assert torch.equal(twice[1][0], twice[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_computes_something_else_after_a_prefix_is_refused_by_kind_of_layer(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    module = make_model("qwen3.5-hybrid").to(dtype)
    check_prefix(module)
    monkeypatch.setattr(forward, "read_prefix", lambda *_: None)  # The context is lost.
    with pytest.raises(UnfaithfulPrefix, match="full_attention, linear_attention.*can be served"):
        check_prefix(module)


def test_layer_whose_state_cannot_be_frozen_is_refused_by_name() -> None:
    class Odd(DynamicLayer):  # type: ignore[misc]
        pass

    with pytest.raises(UnsupportedLayer, match="layer 0 keeps its state in a Odd"):
        freeze(Cache(layers=[Odd()]))


# The loss.


def test_logprobs_and_gradients_in_chunks_equal_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, 16, generator=generator, requires_grad=True)
    ids = torch.randint(VOCAB, (23, 3), generator=generator)
    whole = (hidden @ weight.T).log_softmax(-1).gather(-1, ids)
    expected = torch.autograd.grad(whole.square().sum(), (hidden, weight))
    sizes: list[int] = []

    def head(part: Tensor) -> Tensor:
        sizes.append(part.shape[0])
        return part @ weight.T

    monkeypatch.setattr(loss, "MAX_LOGITS", 5 * VOCAB)
    found = gather_logprobs(head, hidden, ids, VOCAB)
    assert sizes == [5, 5, 5, 5, 3]
    torch.testing.assert_close(found, whole)
    gradient = torch.autograd.grad(found.square().sum(), (hidden, weight))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)


def test_distillation_is_zero_at_the_teacher_and_the_divergence_elsewhere() -> None:
    teacher = torch.tensor([[0.7, 0.2], [0.5, 0.3]]).log()
    student = torch.tensor([[0.5, 0.3], [0.5, 0.3]]).log()
    assert distillation(teacher, teacher).item() == pytest.approx(0, abs=1e-7)
    whole_teacher = torch.tensor([0.7, 0.2, 0.1])
    whole_student = torch.tensor([0.5, 0.3, 0.2])
    expected = (whole_teacher * (whole_teacher / whole_student).log()).sum().item() / 2
    assert distillation(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    certain = torch.tensor([[1.0, 0.0]]).log().clamp_min(-100)
    assert distillation(certain, certain).item() == pytest.approx(0, abs=1e-5)
    assert distillation(student[:1], certain).isfinite()


def test_preference_falls_as_the_chosen_gains_on_the_rejected() -> None:
    low, high = torch.full((4, 1), -2.0), torch.full((4, 1), -0.5)
    better = odds_ratio_preference(high, low, 0.1).item()
    worse = odds_ratio_preference(high, high, 0.1).item()
    odds = [p / (1 - p) for p in (torch.tensor(-0.5).exp().item(), torch.tensor(-2.0).exp().item())]
    ratio = odds[0] / odds[1]
    expected = 0.5 + 0.1 * torch.log(torch.tensor(1 + 1 / ratio)).item()
    assert better == pytest.approx(expected, rel=1e-5)
    assert better < worse == pytest.approx(0.5 + 0.1 * 0.693147, rel=1e-4)
    certain = odds_ratio_preference(torch.zeros(4, 1), low, 0.1)
    assert certain.isfinite()
