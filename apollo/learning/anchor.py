"""Holding on to what the model was: its own opinion of canaries, recorded, then kept to.

    canaries --forward, before the job--> top log-probabilities (the record)
    each step: loss + strength * KL(record || model) on the next canary

Knows canaries and forward passes, not jobs. The canaries are short everyday facts, so that what a
job teaches is unlikely to be among them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from apollo.learning.forward import Reader
from apollo.learning.loss import distillation
from apollo.learning.samples import Example, TopLogprobs, encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_ENTRIES: Final = 20
"""Likeliest entries that are recorded for each token."""

CANARIES: Final = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What colour is the sky on a clear day?", "On a clear day the sky is blue."),
    ("What do bees make?", "Bees make honey."),
    ("What is two plus three?", "Two plus three is five."),
    ("Which planet do we live on?", "We live on Earth."),
    ("What is ice made of?", "Ice is frozen water."),
    ("Name an animal that barks.", "A dog barks."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What do plants need to grow?", "Plants need water, light and soil to grow."),
    ("Which month comes after March?", "April comes after March."),
    ("What is used to write on a blackboard?", "Chalk is used to write on a blackboard."),
    ("Where do fish live?", "Fish live in water."),
    ("What is the largest ocean?", "The Pacific is the largest ocean."),
    ("What language is spoken in Brazil?", "Portuguese is spoken in Brazil."),
)
"""Questions and answers that a small model gets right."""


def record_canaries(
    module: "PreTrainedModel", tokenizer: Any, canaries: Sequence[tuple[str, str]] = CANARIES
) -> list[Example]:
    """The questions and answers with what the model gives to their answers now.

    Blocks for a forward pass of each; raises what `encode_canaries` does.
    """
    examples = encode_canaries(tokenizer, canaries)
    return [replace(example, teacher=_top(module, example)) for example in examples]


def encode_canaries(
    tokenizer: Any, canaries: Sequence[tuple[str, str]] = CANARIES
) -> list[Example]:
    """As turns of a chat; raises SampleError where the tokenizer's template refuses them."""
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in canaries
    ]
    return [encode_chat(tokenizer, pair) for pair in turns]


class Anchor:
    """A job's hold on what the model was when it began."""

    def __init__(self, module: "PreTrainedModel", tokenizer: Any, strength: float) -> None:
        """Blocks for a forward pass of each canary."""
        self._strength = strength
        self._canaries = record_canaries(module, tokenizer)

    def at(self, step: int) -> tuple[Example, float]:
        """The canary of a step, with the strength."""
        return self._canaries[step % len(self._canaries)], self._strength


def _top(module: "PreTrainedModel", example: Example) -> TopLogprobs:
    ids = torch.tensor([example.context_ids + example.continuation_ids], device=module.device)
    with torch.no_grad():
        logits_btv = module(
            input_ids=ids[:, :-1], logits_to_keep=example.num_predicted, use_cache=False
        ).logits
    logprobs_tk, ids_tk = logits_btv[0].float().log_softmax(-1).topk(NUM_ENTRIES)
    return TopLogprobs(
        ids_tk=tuple(map(tuple, ids_tk.tolist())),
        logprobs_tk=tuple(map(tuple, logprobs_tk.tolist())),
    )


def drift(module: "PreTrainedModel", recorded: list[Example]) -> float:
    """Mean KL(record || model) per token over the canaries, in nats."""
    with torch.no_grad():
        found = [divergence(module, example).item() for example in recorded]
    return sum(found) / len(found)


def divergence(module: "PreTrainedModel", example: Example) -> torch.Tensor:
    """KL(record || model) per token of one recorded canary."""
    assert example.teacher is not None, "record_canaries makes the record"
    everything = len(example.context_ids)  # A canary is short: all of it is in the graph.
    reader = Reader(module, example.context_ids, everything, len(example.continuation_ids))
    found_tk = reader.logprobs(example.continuation_ids, example.teacher.ids_tk)
    teacher_tk = torch.tensor(example.teacher.logprobs_tk, device=found_tk.device)
    return distillation(found_tk, teacher_tk)
