"""What a step minimises: one example becomes one loss.

    sft         the continuation itself
    distill     the distribution that a teacher gave to each of its tokens
    preference  the continuation, and its odds over a rejected one (ORPO)

Axes: t = predicted tokens, k = entries per token.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from apollo.learning.forward import Reader
from apollo.learning.loss import cross_entropy, distillation, odds_ratio_preference
from apollo.learning.samples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Objective = Literal["sft", "distill", "preference"]
ODDS_STRENGTH = 0.1
"""Lambda of ORPO, the paper's for instruction models."""


def loss_of(
    module: "PreTrainedModel", example: Example, objective: Objective, grad_context: int
) -> Tensor:
    """The example's loss, times its weight. ValueError if it lacks what the objective needs."""
    if objective == "preference" and not example.rejected_ids:
        raise ValueError("preference needs a rejected continuation")
    if objective == "distill" and example.teacher is None:
        raise ValueError("distill needs a teacher's log-probabilities")
    room = min(len(ids) for ids in (example.continuation_ids, example.rejected_ids) if ids)
    reader = Reader(module, example.context_ids, grad_context, room)
    if objective == "distill" and example.teacher is not None:
        found_tk = reader.logprobs(example.continuation_ids, example.teacher.ids_tk)
        teacher_tk = torch.tensor(example.teacher.logprobs_tk, device=found_tk.device)
        return distillation(found_tk, teacher_tk) * example.weight
    chosen = reader.logprobs(example.continuation_ids)
    if objective == "preference":
        rejected = reader.logprobs(example.rejected_ids)
        return odds_ratio_preference(chosen, rejected, ODDS_STRENGTH) * example.weight
    return cross_entropy(chosen) * example.weight
