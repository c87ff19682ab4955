"""Small random models of every architecture that Reverie teaches, made with transformers' classes,
and checkpoints of them.

Wide initialisation, so that logits are far from uniform and a lost context shows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

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


def qwen3_5_27b() -> Any:
    """The configuration of Qwen3.5-27B's text model."""
    return transformers.Qwen3_5TextConfig(
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=64,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 16,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        vocab_size=248320,
        max_position_embeddings=262144,
        tie_word_embeddings=False,
        architectures=["Qwen3_5ForCausalLM"],
    )


def save(directory: Path, module: Any) -> None:
    """A checkpoint of which no two tensors are alike, not even the norms."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    module.save_pretrained(directory)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[Weights], Weights]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def copy_of(work: Path, name: str, new: str) -> Path:
    """Another checkpoint with the same weights, to be spoilt."""
    target = work / new
    target.mkdir()
    for path in (work / name).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def with_dtype(weights: Weights, part: str, dtype: torch.dtype) -> Weights:
    """The tensors whose name has `part` in another type."""
    return {name: w.to(dtype) if part in name else w for name, w in weights.items()}
