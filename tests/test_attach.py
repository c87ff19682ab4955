"""The trainer's module: a stock Hugging Face model whose parameters are views of shared memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from apollo.weights.attach import attach, bind
from apollo.weights.layout import LayoutError, TensorView, WeightLayout
from apollo.weights.memory import Mapping, place
from apollo.weights.record import Recorder

IDS = torch.tensor([[5, 17, 3, 250, 9, 9, 1]])
LAYERS = 2


def saved_llama(directory: Path, *, is_tied: bool) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
        rope_theta=500.0,
        tie_word_embeddings=is_tied,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


class FusedEngine(nn.Module):
    """Keeps a Llama as vLLM does: qkv and gate_up fused, the vocabulary padded, the head tied."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names: dict[str, tuple[str, int]] = {}
        rows: dict[str, int] = {}
        for name in sorted(weights, key=lambda name: (fused_name(name), "qkvgu".find(part(name)))):
            fused = fused_name(name)
            self.names[name] = (fused, rows.get(fused, 0))
            rows[fused] = rows.get(fused, 0) + len(weights[name])
        for fused, length in rows.items():
            some = next(name for name, (owner, _) in self.names.items() if owner == fused)
            padded = -(-length // 64) * 64 if "embed" in fused else length
            empty = torch.empty(padded, *weights[some].shape[1:])
            self.register_parameter(fused.replace(".", "_"), nn.Parameter(empty))

    def load(self, name: str, tensor: torch.Tensor) -> None:
        fused, row = self.names[name]
        target = self.get_parameter(fused.replace(".", "_")).data
        target[row : row + len(tensor)].copy_(tensor)
        if "embed" in fused:
            target[len(tensor) :].zero_()


def part(name: str) -> str:
    return name.removesuffix("_proj.weight")[-1]


def fused_name(name: str) -> str:
    for piece in ("q_proj", "k_proj", "v_proj"):
        name = name.replace(piece, "qkv_proj")
    for piece in ("gate_proj", "up_proj"):
        name = name.replace(piece, "gate_up_proj")
    return name


def recorded(model_dir: Path, path: Path) -> WeightLayout:
    """The layout of a model in shared memory, found by the recorder."""
    weights = load_file(model_dir / "model.safetensors")
    engine = FusedEngine(weights)
    blocks, spans = place(engine, path)
    recorder = Recorder(spans)
    with recorder, torch.no_grad():
        for name, tensor in recorder.watch(weights.items()):
            engine.load(name, tensor)
    views, padding = recorder.views()
    return WeightLayout.checked("cpu", blocks, views, padding)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def is_tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def model_dir(tmp_path: Path, is_tied: bool) -> Path:
    return saved_llama(tmp_path / "llama", is_tied=is_tied)


@pytest.fixture
def layout(tmp_path: Path, model_dir: Path) -> WeightLayout:
    return recorded(model_dir, tmp_path / "weights")


def test_every_parameter_is_a_view_of_the_file(layout: WeightLayout, model_dir: Path) -> None:
    module = attach(layout, model_dir)
    live = Mapping(layout, is_writable=False).tensors()
    assert set(live) == {name for name, _ in module.named_parameters()}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            assert isinstance(parameter, nn.Parameter) and parameter.requires_grad
            parameter.view(-1)[-1] = number + 0.5
            assert live[name].reshape(-1)[-1] == number + 0.5, name


def test_tied_stays_tied_and_untied_untied(
    layout: WeightLayout, model_dir: Path, is_tied: bool
) -> None:
    module = attach(layout, model_dir)
    head = module.get_parameter("lm_head.weight")
    embedding = module.get_parameter("model.embed_tokens.weight")
    assert (head is embedding) == is_tied
    assert (head.data_ptr() == embedding.data_ptr()) == is_tied
    assert len(layout) == 9 * LAYERS + (2 if is_tied else 3)


def test_logits_are_those_of_the_stock_model(layout: WeightLayout, model_dir: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="sdpa")
    with torch.no_grad():
        torch.testing.assert_close(
            attach(layout, model_dir)(IDS).logits, stock(IDS).logits, rtol=1e-6, atol=1e-6
        )


def test_nothing_is_on_meta_and_rotary_tables_are_real(
    layout: WeightLayout, model_dir: Path
) -> None:
    module = attach(layout, model_dir)
    stock = AutoModelForCausalLM.from_pretrained(model_dir)
    assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    buffers, expected = dict(module.named_buffers()), dict(stock.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


def test_gradient_step_is_seen_through_the_file(layout: WeightLayout, model_dir: Path) -> None:
    module = attach(layout, model_dir)
    live = Mapping(layout, is_writable=False).tensors()
    before = {name: tensor.clone() for name, tensor in live.items()}
    module(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
            parameter.add_(parameter.grad, alpha=-1.0)
            assert torch.equal(live[name], before[name] - parameter.grad), name


# Refusals, each by name.

DOWN = "model.layers.1.mlp.down_proj.weight"


def changed(
    layout: WeightLayout, change: Callable[[TensorView], TensorView | None]
) -> WeightLayout:
    """The layout with one tensor changed, or left out."""
    views = [change(view) if view.name == DOWN else view for view in layout]
    return replace(layout, tensors=tuple(view for view in views if view is not None))


def test_tensor_that_the_engine_lacks_is_refused(layout: WeightLayout, model_dir: Path) -> None:
    with pytest.raises(LayoutError, match=rf"^{DOWN}: .*the engine serves no such tensor"):
        attach(changed(layout, lambda view: None), model_dir)


def test_norm_that_the_engine_lacks_is_refused(layout: WeightLayout, model_dir: Path) -> None:
    kept = tuple(view for view in layout if view.name != "model.norm.weight")
    with pytest.raises(LayoutError, match=r"^model\.norm\.weight: "):
        attach(replace(layout, tensors=kept), model_dir)


def test_tensor_that_the_module_lacks_is_refused(layout: WeightLayout, model_dir: Path) -> None:
    extra = replace(next(iter(layout)), name="model.layers.9.extra.weight")
    with pytest.raises(LayoutError, match=r"^model\.layers\.9\.extra\.weight: is served, but"):
        attach(replace(layout, tensors=(*layout.tensors, extra)), model_dir)


def test_other_shape_is_refused(layout: WeightLayout, model_dir: Path) -> None:
    def turn(view: TensorView) -> TensorView:
        return replace(view, shape=view.shape[::-1], stride=(view.shape[0], 1))

    with pytest.raises(LayoutError, match=rf"^{DOWN}: \(64, 32\) in the engine, \(32, 64\)"):
        attach(changed(layout, turn), model_dir)


def test_other_dtype_is_refused(layout: WeightLayout, model_dir: Path) -> None:
    with pytest.raises(LayoutError, match=rf"^{DOWN}: torch\.bfloat16 in the engine"):
        attach(changed(layout, lambda view: replace(view, dtype="bfloat16")), model_dir)


def test_parameter_that_ends_as_a_copy_is_refused() -> None:
    class CopiesWhenTied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.empty(3, device="meta"))

        def tie_weights(self) -> None:
            self.w = nn.Parameter(self.w.detach().clone())

    with pytest.raises(LayoutError, match=r"^w: is a copy"):
        bind(CopiesWhenTied(), {"w": torch.ones(3)})


def test_buffer_without_memory_is_refused() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.empty(3, device="meta"))
    with pytest.raises(LayoutError, match=r"^table: "):
        bind(module, {})
