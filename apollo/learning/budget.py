"""What a step may take: tokens, memory estimated before and measured after, time.

Estimates are sums over the model's configuration; what a step really took is asked of the system.
Knows configurations and processes, not samples or jobs.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apollo.learning.loss import MAX_LOGITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVED_HIDDEN, SAVED_HEADS, SAVED_MLP = 10, 4, 5
"""Copies of a token's hidden state, of its queries, keys and values, and of its feed-forward state
that a layer keeps for the backward pass: counted in the modules' code, good to a factor of two."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one step beyond weights and optimizer state."""

    activations: int
    logits: int
    gradient: int
    """The largest single gradient: they never all exist."""
    prefix: int
    """Keys and values of the context that is only read: as they are cached, and as each layer joins
    them to its own, for every query head, and keeps them for the backward pass."""

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.gradient + self.prefix


def estimate_memory(
    module: "PreTrainedModel", num_grad_tokens: int, num_read_tokens: int, is_checkpointed: bool
) -> Memory:
    """What a step will take beyond what is there between steps; allocates nothing."""
    config = module.config.get_text_config()
    itemsize = module.dtype.itemsize
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = (config.num_attention_heads + 2 * num_kv_heads) * head_dim
    mlp = config.intermediate_size
    if num_experts := getattr(config, "num_experts_per_tok", None):
        mlp = num_experts * (getattr(config, "moe_intermediate_size", None) or mlp)
    layer = SAVED_HIDDEN * config.hidden_size + SAVED_HEADS * heads + SAVED_MLP * mlp
    num_layers = config.num_hidden_layers
    kept = num_layers * config.hidden_size + layer if is_checkpointed else num_layers * layer
    num_joined = 1 if is_checkpointed else num_layers
    read = 2 * head_dim * (num_layers * num_kv_heads + num_joined * config.num_attention_heads)
    num_logit_tokens = min(num_grad_tokens, max(1, MAX_LOGITS // config.vocab_size))
    trained = [param.nbytes for param in module.parameters() if param.requires_grad]
    return Memory(
        activations=num_grad_tokens * kept * itemsize,
        logits=3 * num_logit_tokens * config.vocab_size * 4,
        gradient=max(trained, default=0),
        prefix=num_read_tokens * read * itemsize,
    )


@contextmanager
def measured_peak(device: torch.device) -> Iterator[list[int]]:
    """Put the most bytes that were taken inside, over those at its start, into the list at its end.

    On a GPU as torch's allocator counts; on a CPU the resident memory of the process, where the
    kernel lets us reset its mark: otherwise the list stays empty. What was freed before and kept by
    the C library's allocator is resident already, and does not count when it is used again.
    """
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        begun = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - begun)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
        begun = _resident("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found.append(max(0, _resident("VmHWM") - begun))


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    match: Any = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024
