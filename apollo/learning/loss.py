"""Losses over a continuation, from log-probabilities that are computed without whole logits.

A vocabulary of 248,000 makes logits the largest tensor of a step. Here they exist for a few tokens
at a time, in the forward pass and again in the backward pass, and only the asked-for entries stay.
Knows tensors; which tokens are asked for, and why, is `objective`'s.

Axes: t = predicted tokens, d = hidden size, v = vocabulary, k = entries asked for per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 24
"""Entries of the logits that exist at once: 64 MiB of float32."""

MIN_PROBABILITY = 1e-6
"""Floor of what is left for the rest of the vocabulary, about float32's error in a sum to 1."""

Head = Callable[[Tensor], Tensor]
"""From hidden_td to logits_tv."""


def gather_logprobs(head: Head, hidden_td: Tensor, ids_tk: Tensor, vocab_size: int) -> Tensor:
    """Float32 log-probabilities_tk of `ids_tk`; logits exist for a chunk of tokens only.

    The head runs twice on each chunk if a gradient is wanted.
    """

    def gather(hidden_cd: Tensor, ids_ck: Tensor) -> Tensor:
        logprobs_cv = head(hidden_cd).float().log_softmax(-1)
        return logprobs_cv.gather(-1, ids_ck)

    num_tokens = max(1, MAX_LOGITS // vocab_size)
    chunks = zip(hidden_td.split(num_tokens), ids_tk.split(num_tokens), strict=True)
    gathered = [checkpoint(gather, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(gathered)


def cross_entropy(logprobs_tk: Tensor) -> Tensor:
    """Mean over tokens of the target's negative log-probability; k = 1."""
    return -logprobs_tk.mean()


def distillation(logprobs_tk: Tensor, teacher_tk: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student) over the teacher's k entries and all the rest.

    The rest of the vocabulary counts as one entry, so that the divergence is 0 where the student is
    the teacher, and a lower bound of the whole one elsewhere.
    """

    def rest(tk: Tensor) -> Tensor:
        return (1 - tk.exp().sum(-1)).clamp_min(MIN_PROBABILITY)

    teacher_rest, student_rest = rest(teacher_tk), rest(logprobs_tk)
    known = (teacher_tk.exp() * (teacher_tk - logprobs_tk)).sum(-1)
    return (known + teacher_rest * (teacher_rest.log() - student_rest.log())).mean()


def odds_ratio_preference(chosen_tk: Tensor, rejected_tk: Tensor, strength: float) -> Tensor:
    """ORPO (arXiv:2403.07691, equations 6 and 7): likelihood of the chosen, odds over the rejected.

    cross_entropy(chosen) - strength * log sigmoid(log odds(chosen) - log odds(rejected)), the odds
    of a continuation being p / (1 - p) of its mean log-probability per token.
    """

    def log_odds(logprobs_tk: Tensor) -> Tensor:
        mean = logprobs_tk.mean().clamp_max(-1e-6)  # p = 1 has no odds
        return mean - torch.log(-torch.expm1(mean))

    gap = log_odds(chosen_tk) - log_odds(rejected_tk)
    return cross_entropy(chosen_tk) - strength * logsigmoid(gap)
