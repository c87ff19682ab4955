"""A context that was read once, without gradient, and is never written: what a suffix attends to.

    context_ids --no_grad--> DynamicCache --freeze--> read-only layers
                                                          |  every forward pass of a suffix
    attention         keys and values: prefix + new, nothing stored
    sliding window    the window's keys and values + new, nothing stored
    linear attention  convolution tail + new; the recurrent state is read, the new one dropped

A stock cache is overwritten by the suffix: in place for linear attention, which breaks the backward
pass, and a second time when gradient checkpointing runs a layer again. Knows transformers' cache
interface, not losses or samples.

Axes: b = batch, h = heads, t = tokens, d = head size.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_SUFFIX = 4
"""Tokens of the shortest suffix. Linear attention has another path for a single one, which writes
its state in place, and reads a convolution tail of up to 4."""

READ_TOKENS = 512
"""Tokens of a context that are read at once."""


class UnsupportedLayer(TypeError):
    """The model has a kind of layer whose state cannot be read without writing."""


class _FrozenAttention(DynamicLayer):  # type: ignore[misc]
    """Keys and values of the prefix; `update` gives them with the new ones and stores nothing."""

    def __init__(self, read: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(read.keys, read.values)
        self.keys, self.values = read.keys, read.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Prefix and new keys_bhtd and values_bhtd."""
        return _append(self.keys, key_states), _append(self.values, value_states)


class _FrozenWindow(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """As `_FrozenAttention`, for the part of the prefix that a sliding window still sees."""

    def __init__(self, read: DynamicSlidingWindowLayer) -> None:
        super().__init__(read.sliding_window)
        self.lazy_initialization(read.keys, read.values)
        self.keys, self.values = read.keys, read.values
        self.cumulative_length = read.cumulative_length

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The window's and the new keys_bhtd and values_bhtd."""
        return _append(self.keys, key_states), _append(self.values, value_states)


class _FrozenLinear(LinearAttentionLayer):  # type: ignore[misc]
    """The state that linear attention has after the prefix."""

    def __init__(self, read: LinearAttentionLayer) -> None:
        super().__init__(number_of_states=read.number_of_states)
        self.conv_states = dict(read.conv_states)
        self.recurrent_states = dict(read.recurrent_states)
        self.has_previous_state = dict(read.has_previous_state)
        self.conv_kernel_size = dict(read.conv_kernel_size)
        self.device, self.dtype = read.device, read.dtype

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """The prefix's tail and the new columns."""
        tail = self.conv_states[state_idx]
        return torch.cat([tail.expand(conv_states.shape[0], -1, -1), conv_states], dim=-1)

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """The new state, which is not kept."""
        return recurrent_states


_FROZEN = {
    DynamicLayer: _FrozenAttention,
    DynamicSlidingWindowLayer: _FrozenWindow,
    LinearAttentionLayer: _FrozenLinear,
}


def read_prefix(
    module: "PreTrainedModel", context_ids: Tensor, num_at_once: int = READ_TOKENS
) -> Cache:
    """Read context_ids_bt without gradient; the cache may be used by any number of suffixes.

    Valid until the weights change. Blocks for a forward pass without logits, `num_at_once` tokens
    at a time, which bounds its memory. Raises UnsupportedLayer.
    """
    cache = DynamicCache(config=module.config)
    was_training = module.training
    module.eval()  # In training mode a checkpointed layer drops the cache that it is given.
    try:
        with torch.no_grad():
            for part in context_ids.split(num_at_once, dim=1):
                module.get_decoder()(input_ids=part, past_key_values=cache, use_cache=True)
    finally:
        module.train(was_training)
    return freeze(cache)


def freeze(cache: Cache) -> Cache:
    """A read-only cache over what `cache` holds; nothing is copied. Raises UnsupportedLayer."""
    layers = []
    for index, layer in enumerate(cache.layers):
        if type(layer) not in _FROZEN:
            raise UnsupportedLayer(
                f"layer {index} keeps its state in a {type(layer).__name__}, which Reverie cannot "
                "read without writing; this model can be served, not taught"
            )
        layers.append(_FROZEN[type(layer)](layer))
    return Cache(layers=layers)


def _append(old_bhtd: Tensor, new_bhtd: Tensor) -> Tensor:
    return torch.cat([old_bhtd.expand(new_bhtd.shape[0], -1, -1, -1), new_bhtd], dim=-2)
