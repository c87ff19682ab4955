"""What a model will take of memory, by arithmetic: from its configuration, before it is loaded.

    config.json --> module without memory --> weights, optimizer state, one step

Bytes of what this process and vLLM's compute with; what the libraries themselves take is not here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apollo.learning.budget import Memory, estimate_memory
from apollo.optim.optimizer import Apollo
from apollo.optim.routing import Plan, make_plan
from apollo.optim.update import make_state
from apollo.weights.attach import empty_module
from apollo.weights.layout import DTYPES


@dataclass(frozen=True)
class Footprint:
    """Bytes, if not said otherwise."""

    num_parameters: int
    max_len: int
    """Longest context that the model was made for, in tokens."""
    weights: int
    state: int
    """Of the optimizer, once each trained tensor has had a step."""
    projections: int
    """Which torch's kernels keep until the next refresh; Triton's draw them where they are used."""
    kv_per_token: int
    """Keys and values that one token of context keeps; layers without attention keep none."""
    step: Memory


def footprint(
    config_dir: Path,
    dtype: str,
    num_grad_tokens: int,
    num_read_tokens: int,
    *,
    train_embeddings: bool = False,
    checkpoint_layers: bool = False,
    **settings: Any,
) -> Footprint:
    """Of the model whose config.json is in `config_dir`; `settings` are Apollo's.

    Raises whatever transformers raises for a configuration that it does not know.
    """
    module: Any = empty_module(config_dir, DTYPES[dtype])
    module.tie_weights()
    for part in (module.get_input_embeddings(), module.get_output_embeddings()):
        if part is not None:
            part.requires_grad_(train_embeddings)
    params = dict(module.named_parameters())
    trained = [(name, each) for name, each in params.items() if each.requires_grad]
    group = Apollo(trained, **settings).param_groups[0]
    plans = [_plan(name, each, group) for name, each in trained]
    config = module.config.get_text_config()
    return Footprint(
        num_parameters=sum(each.numel() for each in params.values()),
        max_len=int(getattr(config, "max_position_embeddings", 0)),
        weights=sum(each.nbytes for each in params.values()),
        state=sum(map(_state_bytes, plans)),
        projections=sum(4 * plan.rank * plan.side for plan in plans),
        kv_per_token=_kv_per_token(config, module.dtype.itemsize),
        step=estimate_memory(module, num_grad_tokens, num_read_tokens, checkpoint_layers),
    )


def _plan(name: str, param: torch.Tensor, group: dict[str, Any]) -> Plan:
    return make_plan(name, tuple(param.shape), param.dtype == torch.bfloat16, group)


def _state_bytes(plan: Plan) -> int:
    return sum(each.nbytes for each in make_state(plan, torch.device("meta")).values())


def _kv_per_token(config: Any, itemsize: int) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    num_layers = sum("linear" not in kind for kind in kinds)
    return int(2 * num_layers * num_kv_heads * head_dim * itemsize)
