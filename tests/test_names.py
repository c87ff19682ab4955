"""Which view is which parameter of a transformers module; what cannot be said is refused by name.

The memory is drawn by hand: a Qwen3 with three experts in one layer, as vLLM lays them out, and
then with one thing moved.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from apollo.weights.layout import Block, LayoutError, Part, TensorView, WeightLayout
from apollo.weights.names import parameter_views

EXPERTS, INNER, HIDDEN = 3, 8, 16
PLACE = "model.layers.0.mlp.experts."
W13, W2 = f"{PLACE}gate_up_proj", f"{PLACE}down_proj"
FIRST_BYTE = 2**20
"""Of w13; w2 comes a mebibyte later, everything else before."""


@pytest.fixture(scope="module")
def module() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        return transformers.Qwen3MoeForCausalLM(config)


def view_of(name: str, at: int, *shape: int, row: int | None = None) -> TensorView:
    """A float32 tensor at element `at`, whose rows are `row` elements apart."""
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    strides.reverse()
    if row is not None:
        strides[-2] = row
    return TensorView(name, 0, 4 * at, shape, tuple(strides), "float32")


def layout_of(module: Any, change: Callable[[TensorView], TensorView | None]) -> WeightLayout:
    """All tensors of the checkpoint where vLLM has them, but for the change."""
    views = [changed for view in all_views(module) if (changed := change(view)) is not None]
    return WeightLayout("cpu", (Block("", 2**23), Block("", 2**23)), tuple(views))


def all_views(module: Any) -> Iterator[TensorView]:
    at = 0
    for name, parameter in module.named_parameters():
        if ".experts." not in name:
            yield view_of(name, at, *parameter.shape)
            at += parameter.numel()
    matrix = INNER * HIDDEN
    for expert in range(EXPERTS):
        first = FIRST_BYTE // 4 + 2 * expert * matrix
        yield view_of(f"{PLACE}{expert}.gate_proj.weight", first, INNER, HIDDEN)
        yield view_of(f"{PLACE}{expert}.up_proj.weight", first + matrix, INNER, HIDDEN)
        first = FIRST_BYTE // 2 + expert * matrix
        yield view_of(f"{PLACE}{expert}.down_proj.weight", first, HIDDEN, INNER)


def keep(view: TensorView) -> TensorView:
    return view


def test_experts_that_lie_as_vllm_lays_them_are_one_view(module: Any) -> None:
    views = parameter_views(module, layout_of(module, keep))
    matrix = INNER * HIDDEN
    assert views[W13] == replace(
        view_of(W13, FIRST_BYTE // 4, EXPERTS, 2 * INNER, HIDDEN), stride=(2 * matrix, HIDDEN, 1)
    )
    assert views[W2] == view_of(W2, FIRST_BYTE // 2, EXPERTS, HIDDEN, INNER)


def test_every_parameter_has_a_view_of_its_shape(module: Any) -> None:
    views = parameter_views(module, layout_of(module, keep))
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert {name: view.shape for name, view in views.items()} == shapes
    assert all(view.name == name for name, view in views.items())


def test_padded_rows_are_a_strided_view(module: Any) -> None:
    wide = INNER + 8

    def pad(view: TensorView) -> TensorView:
        if "down_proj" not in view.name:
            return view
        at = FIRST_BYTE // 2 + int(view.name.split(".")[5]) * HIDDEN * wide
        return view_of(view.name, at, HIDDEN, INNER, row=wide)

    found = parameter_views(module, layout_of(module, pad))[W2]
    assert (found.shape, found.stride) == ((EXPERTS, HIDDEN, INNER), (HIDDEN * wide, wide, 1))


def moved(name: str, num_bytes: int) -> Callable[[TensorView], TensorView]:
    def move(view: TensorView) -> TensorView:
        is_moved = name in view.name
        return replace(view, offset_bytes=view.offset_bytes + num_bytes) if is_moved else view

    return move


def halves_swapped(view: TensorView) -> TensorView:
    """As FlashInfer's CUTLASS kernels have them: up before gate."""
    half = 4 * INNER * HIDDEN
    return moved("up_proj", -half)(moved("gate_proj", half)(view))


def reversed_order(view: TensorView) -> TensorView:
    parts = view.name.split(".")
    if "experts" in parts:
        parts[5] = str(EXPERTS - 1 - int(parts[5]))
    return replace(view, name=".".join(parts))


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        (halves_swapped, W13),
        (reversed_order, W2),
        (moved("experts.1.up_proj", 2**16), W13),
        (moved("up_proj", 4 * HIDDEN), W13),
        (moved("experts.2.down_proj", 4), W2),
        (lambda v: None if "1.up_proj" in v.name else v, W13),
        (lambda v: replace(v, block=1) if "1.down" in v.name else v, W2),
        (lambda v: replace(v, dtype="bfloat16") if "1.down" in v.name else v, W2),
        (lambda v: replace(v, shape=v.shape[::-1]) if "1.down" in v.name else v, W2),
    ],
    ids=[
        "halves swapped",
        "reversed",
        "one elsewhere",
        "gap between halves",
        "one shifted",
        "one missing",
        "another block",
        "another type",
        "another shape",
    ],
)
def test_experts_that_lie_otherwise_are_refused_by_name(
    module: Any, change: Callable[[TensorView], TensorView | None], parameter: str
) -> None:
    with pytest.raises(LayoutError, match=rf"^{PLACE}\d\.\w+_proj\.weight: .*{parameter}\)$"):
        parameter_views(module, layout_of(module, change))


def test_tensor_that_transformers_would_change_is_refused_by_name(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = WeightConverter("mlp.gate.weight", "mlp.gate.weight", operations=[Transpose(0, 1)])
    own = conversion_mapping.get_model_conversion_mapping(module)
    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda module: [*own, turn]
    )
    match = r"^model\.layers\.0\.mlp\.gate\.weight: transformers changes it by Transpose"
    with pytest.raises(LayoutError, match=match):
        parameter_views(module, layout_of(module, keep))


def test_part_of_a_tensor_is_refused_by_name(module: Any) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"

    def cut(view: TensorView) -> TensorView:
        return replace(view, part=Part((0, 0), (32, 16))) if view.name == name else view

    with pytest.raises(LayoutError, match=rf"^{name}: only a part .*one cell is one device"):
        parameter_views(module, layout_of(module, cut))


def test_second_tensor_for_a_parameter_is_refused_by_name(module: Any) -> None:
    layout = layout_of(module, keep)
    # Named as in a checkpoint of the model without its head, which transformers understands too.
    again = replace(next(iter(layout)), name="norm.weight")
    with pytest.raises(LayoutError, match=r"norm\.weight: is a second tensor for the module's"):
        parameter_views(module, replace(layout, tensors=(*layout.tensors, again)))


def test_tensor_that_the_module_does_not_know_keeps_its_name(module: Any) -> None:
    layout = layout_of(module, keep)
    extra = replace(next(iter(layout)), name="model.visual.patch.weight")
    views = parameter_views(module, replace(layout, tensors=(*layout.tensors, extra)))
    assert views["model.visual.patch.weight"] == extra
