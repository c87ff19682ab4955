"""Log-probabilities of a continuation after a context that is read, not learned.

    context[:-K] --no_grad--> read-only prefix     (shared by all continuations of the context)
                                   |
    context[-K:] + continuation --forward, with gradient--> hidden --head, in chunks--> logprobs

The last context token predicts the first of the continuation, so K is at least 1, and at least
what makes a suffix of MIN_SUFFIX tokens. K = everything is ordinary training on the whole sequence.

Axes: b = batch (1), t = predicted tokens, d = hidden size, v = vocabulary, k = entries per token.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apollo.learning.loss import gather_logprobs
from apollo.learning.prefix import MIN_SUFFIX, READ_TOKENS, read_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

CHECK_TOKENS = (40, 9)
"""Context and continuation of the start-up check: longer than any convolution's tail."""
CHECK_READ_TOKENS = 25
"""So that the context of that check is read in two parts."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest difference of a log-probability in the start-up check."""
LOST_SHARE = 0.1
"""In bfloat16, where two right ways of computing differ by some tenths: or this share of what the
loss of the context would change."""


class UnfaithfulPrefix(ArithmeticError):
    """The model computes something else after a read-only prefix than on the whole sequence."""


class Reader:
    """One context, read once, for any number of continuations; valid until the weights change."""

    def __init__(
        self,
        module: "PreTrainedModel",
        context_ids: Sequence[int],
        grad_context: int,
        room: int,
        num_at_once: int = READ_TOKENS,
    ) -> None:
        """`room` is the number of continuation tokens that certainly follow."""
        num_grad = max(1, grad_context, MIN_SUFFIX + 1 - room)
        num_read = max(0, len(context_ids) - num_grad)
        self._module = module
        self._tail = tuple(context_ids[num_read:])
        self._prefix: Cache | None = None
        self.num_read = num_read
        """Context tokens that are read without gradient."""
        if num_read:
            ids = torch.tensor([context_ids[:num_read]], device=module.device)
            self._prefix = read_prefix(module, ids, num_at_once)

    def logprobs(
        self, continuation_ids: Sequence[int], ids_tk: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Float32 log-probabilities_tk of `ids_tk`, by default of the continuation itself.

        Without a context the first continuation token is only read, and t is one less.
        """
        suffix = self._tail + tuple(continuation_ids)
        num_predicted = len(continuation_ids) - (not self._tail)
        asked = ids_tk or [[token] for token in suffix[-num_predicted:]]
        device = self._module.device
        hidden_btd = self._module.get_decoder()(
            input_ids=torch.tensor([suffix[:-1]], device=device),
            past_key_values=self._prefix,
            use_cache=False,
        ).last_hidden_state
        return gather_logprobs(
            self._head,
            hidden_btd[0, -num_predicted:],
            torch.tensor(asked, device=device),
            self._module.config.get_text_config().vocab_size,
        )

    def _head(self, hidden_td: Tensor) -> Tensor:
        config = self._module.config.get_text_config()
        logits_tv: Tensor = self._module.get_output_embeddings()(hidden_td)
        if cap := getattr(config, "final_logit_softcapping", None):
            logits_tv = torch.tanh(logits_tv / cap) * cap
        return logits_tv


def let_checkpointing_read(module: "PreTrainedModel") -> None:
    """Turn on gradient checkpointing that keeps a prefix: layers may read one that none writes."""
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in module.modules():
        if hasattr(layer, "gradient_checkpointing"):
            layer._can_checkpoint_with_cache = True


def check_prefix(module: "PreTrainedModel") -> None:
    """Compare a continuation after a read-only prefix with the model's own full forward pass.

    In the module's present mode, training included. Raises UnfaithfulPrefix with the kinds of layer
    if log-probabilities differ: teaching such a model would drop its context without a word.
    """
    num_context, num_continuation = CHECK_TOKENS
    vocab_size = module.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (num_context + num_continuation,), generator=generator).tolist()
    context, continuation = ids[:num_context], ids[num_context:]
    with torch.no_grad():
        logits_btv = module(
            input_ids=torch.tensor([ids[:-1]], device=module.device), use_cache=False
        ).logits
    expected_tv = logits_btv[0, -num_continuation:].float().log_softmax(-1)
    targets = torch.tensor(continuation, device=module.device).unsqueeze(-1)
    expected = expected_tv.gather(-1, targets)
    try:
        # With gradient: checkpointing does what it does only then.
        reader = Reader(module, context, 0, num_continuation, CHECK_READ_TOKENS)
        found = reader.logprobs(continuation).detach()
        difference = (found - expected).abs().max().item()
        finding = f"log-probabilities differ by {difference:.3g} from the full forward pass"
    except RuntimeError as error:
        difference, finding = math.inf, str(error)
    tolerance = TOLERANCES[module.dtype]
    if difference > tolerance and module.dtype == torch.bfloat16:
        alone = Reader(module, (), 0, num_continuation, CHECK_READ_TOKENS).logprobs(continuation)
        num_predicted = len(alone)  # Nothing predicts the first token of all.
        lost = (alone.detach() - expected[-num_predicted:]).abs().max().item()
        tolerance = max(tolerance, LOST_SHARE * lost)
    if not difference <= tolerance:
        config = module.config.get_text_config()
        kinds = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))
        raise UnfaithfulPrefix(
            f"{type(module).__name__} with layers {', '.join(kinds)} cannot read its context apart "
            f"({finding}); it can be served, not taught, with this version of transformers"
        )
