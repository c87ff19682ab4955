"""Small random models of every architecture that Reverie teaches, made with transformers' classes.

Wide initialisation, so that logits are far from uniform and a lost context shows.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}
WITH_HEADS: dict[str, Any] = COMMON | {"head_dim": 8}
WINDOW = 16
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**WITH_HEADS)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**WITH_HEADS, tie_word_embeddings=True)
    ),
    "qwen2-biases": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**WITH_HEADS)),
    "mistral-window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**WITH_HEADS, sliding_window=WINDOW)
    ),
    "gemma3-windows": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **WITH_HEADS,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 1
            + ["sliding_attention"],
        )
    ),
    "gemma2-softcap": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**WITH_HEADS, sliding_window=WINDOW, final_logit_softcapping=5.0)
    ),
    "mixtral-experts": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**COMMON, **EXPERTS, num_local_experts=4)
    ),
    "qwen3-experts": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **WITH_HEADS, **EXPERTS, num_experts=4, moe_intermediate_size=24
        )
    ),
    "qwen3.5-hybrid": lambda: transformers.Qwen3_5ForCausalLM(
        transformers.Qwen3_5TextConfig(
            **WITH_HEADS,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        )
    ),
}


def make_model(name: str) -> Any:
    """A float32 model in training mode; the same weights every time."""
    torch.manual_seed(0)
    return ARCHITECTURES[name]().train()
