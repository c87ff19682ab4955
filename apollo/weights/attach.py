"""Builds a Hugging Face module whose parameters are views of the engine's weight memory.

Runs in the trainer's process. The module is created without memory, each parameter is bound to the
view that transformers would have filled it from, tied parameters are tied again, and nothing may
remain without memory at the end.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from apollo.weights.layout import DTYPES, LayoutError, WeightLayout
from apollo.weights.memory import Mapping
from apollo.weights.names import parameter_views


def attach(layout: WeightLayout, model_dir: Path) -> nn.Module:
    """A causal-LM module over the live weights: writing its parameters changes what is served.

    Non-persistent buffers (rotary tables) are this process's own. Raises LayoutError with the name
    of a tensor that has no counterpart, on either side, or another shape or type.
    """
    module = empty_module(model_dir, main_dtype(layout))
    views = parameter_views(module, layout)
    live = Mapping(layout, is_writable=True)
    bind(module, {name: live.tensor(view) for name, view in views.items()})
    return module


def empty_module(model_dir: Path, dtype: torch.dtype) -> nn.Module:
    """The module of `model_dir`'s configuration, its parameters on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        module: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return module


def main_dtype(layout: WeightLayout) -> torch.dtype:
    """The type of most bytes: what the module computes in."""
    size_bytes: Counter[str] = Counter()
    for view in layout:
        size_bytes[view.dtype] += view.size_bytes
    return DTYPES[size_bytes.most_common(1)[0][0]]


def bind(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Replace every parameter of `module` by the tensor of its name; ties are made again after.

    A vector that the engine keeps in float32 stays so, whatever the module's type.
    """
    left = dict(tensors)
    for name, empty in list(module.named_parameters(remove_duplicate=False)):
        if name not in tensors:
            continue
        view = left.pop(name)
        if view.shape != empty.shape:
            raise LayoutError(
                f"{name}: {tuple(view.shape)} in the engine, {tuple(empty.shape)} in the module"
            )
        is_wide_vector = view.dim() == 1 and view.dtype == torch.float32
        if view.dtype != empty.dtype and not is_wide_vector:
            raise LayoutError(f"{name}: {view.dtype} in the engine, {empty.dtype} in the module")
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(view)
    if left:
        raise LayoutError(
            f"{min(left)}: is served, but the trainer's module has no parameter of that name"
        )
    tie: Callable[[], None] | None = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise LayoutError(f"{name}: the module needs it, but the engine serves no such tensor")
    addresses = {tensor.data_ptr() for tensor in tensors.values()}
    bound = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in bound.items():
        if parameter.data_ptr() not in addresses:
            raise LayoutError(f"{name}: is a copy, not a view of the engine's memory")
    for name, tensor in tensors.items():
        if bound[name].data_ptr() != tensor.data_ptr():
            raise LayoutError(
                f"{name}: is served, but the trainer's module ties it to another tensor; "
                "set tie_word_embeddings to false in config.json"
            )
