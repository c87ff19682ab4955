"""From a posted sample to a TrainingSample: tokens, checked for what the objective needs.

    ChatSample, TextSample, TokenSample --tokenise, truncate, check--> TrainingSample

Knows samples and objectives; the tokenizer's arithmetic is `apollo.learning.samples`.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from actors.errors import InvalidRequest
from actors.messages import TrainingSample
from actors.posted import ChatSample, Sample, TextSample, TrainConfig
from actors.settings import MIB, TrainerSettings

if TYPE_CHECKING:
    from apollo.learning.budget import Memory
    from apollo.learning.samples import Example

NEEDS: Final = {
    "distill": "something that only the teacher reads: mark instructions with strip, or give "
    "teacher_context",
    "preference": "a rejected continuation: give rejected",
}


@dataclass(frozen=True)
class Encoder:
    """Encodes for one model."""

    tokenizer: Any
    vocab_size: int
    max_len: int
    """Longest context and continuation together; contexts are cut on the left to fit."""
    check_size: Callable[[int, int], None] = lambda num_grad_tokens, num_read_tokens: None
    """Raises InvalidRequest for more tokens, with and without gradient, than a step may have."""

    def check(self, config: TrainConfig) -> None:
        """Raise InvalidRequest for what this model cannot be taught with."""
        if not config.anchor:
            return
        from apollo.learning.anchor import encode_canaries
        from apollo.learning.samples import SampleError

        try:
            encode_canaries(self.tokenizer)
        except SampleError as error:
            raise InvalidRequest(
                f"config.anchor: the canaries are turns of a chat, and {error}; leave it out"
            ).about("config.anchor") from None

    def encode(self, sample: Sample, at: int, config: TrainConfig) -> TrainingSample:
        """The sample at place `at` of a request; raises InvalidRequest that names it."""
        from apollo.learning.samples import SampleError

        where = f"samples[{at}]"
        try:
            learned = self._encode(sample)
            rejected_ids = self._rejected(sample, learned)
            teacher_ids: tuple[int, ...] = ()
            if config.objective == "distill":
                teacher_ids = self._teacher_context(sample, learned)
            found = {"distill": teacher_ids, "preference": rejected_ids}
            if not found.get(config.objective, True):
                need = NEEDS[config.objective]
                raise SampleError(f"the objective {config.objective!r} needs {need}")
            if rejected_ids and config.objective != "preference":
                raise SampleError(
                    "a rejected continuation is used by the objective 'preference' only; "
                    "set config.objective, or leave it out"
                )
        except SampleError as error:
            raise InvalidRequest(f"{where}: {error}").about(where) from None
        num_context = len(learned.context_ids)
        num_in_graph = min(num_context, max(1, config.grad_context))
        num_learned = len(learned.continuation_ids) + len(rejected_ids)
        num_tails = 2 if rejected_ids else 1
        try:
            self.check_size(num_learned + num_tails * num_in_graph, num_context - num_in_graph)
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: {error}").about(where) from None
        content = sample.model_dump_json(exclude={"id", "source"}, exclude_defaults=True)
        return TrainingSample(
            id=sample.id or f"sample-{os.urandom(8).hex()}",
            context_ids=learned.context_ids,
            continuation_ids=learned.continuation_ids,
            rejected_ids=rejected_ids,
            teacher_context_ids=teacher_ids,
            weight=sample.weight,
            source=sample.source,
            content_hash=hashlib.sha256(content.encode()).hexdigest(),
        )

    def _encode(self, sample: Sample, **changes: Any) -> "Example":
        """Context and continuation of `sample` with some of its fields changed."""
        from apollo.learning import samples

        return samples.truncate(self._whole(sample, **changes), self.max_len)

    def _whole(self, sample: Sample, **changes: Any) -> "Example":
        from apollo.learning import samples

        sample = sample.model_copy(update=changes)
        if isinstance(sample, ChatSample):
            messages = [message.model_dump() for message in sample.messages]
            return samples.encode_chat(
                self.tokenizer, messages, sample.strip, is_finished=sample.is_finished
            )
        if isinstance(sample, TextSample):
            return samples.encode_text(self.tokenizer, sample.context, sample.continuation)
        return samples.check_ids(sample.context_ids, sample.continuation_ids, self.vocab_size)

    def _rejected(self, sample: Sample, learned: "Example") -> tuple[int, ...]:
        """The rejected continuation, with room for it after the same context."""
        from apollo.learning.samples import SampleError

        if isinstance(sample, ChatSample):
            if sample.rejected is None:
                return ()
            answer = sample.messages[-1].model_copy(update={"content": sample.rejected})
            rejected = self._encode(sample, messages=[*sample.messages[:-1], answer])
        elif isinstance(sample, TextSample):
            if sample.rejected is None:
                return ()
            rejected = self._encode(sample, continuation=sample.rejected)
        elif sample.rejected_ids:
            rejected = self._encode(sample, continuation_ids=sample.rejected_ids)
        else:
            return ()
        if rejected.continuation_ids == learned.continuation_ids:
            raise SampleError("the rejected continuation is the one that is learned; change it")
        return rejected.continuation_ids

    def _teacher_context(self, sample: Sample, learned: "Example") -> tuple[int, ...]:
        """The context with its instructions; empty if it has none."""
        from apollo.learning.samples import SampleError

        if isinstance(sample, ChatSample):
            shown = [message.model_copy(update={"strip": False}) for message in sample.messages]
            taught = self._whole(sample, messages=shown, strip=[])
        elif isinstance(sample, TextSample):
            taught = self._whole(sample, context=sample.teacher_context or sample.context)
        else:
            ids = sample.teacher_context_ids or sample.context_ids
            taught = self._whole(sample, context_ids=ids)
        if taught.continuation_ids != learned.continuation_ids:
            raise SampleError(
                "the chat template renders the answer differently with and without the "
                "instructions; send this sample as context_ids and continuation_ids"
            )
        if taught.context_ids == self._whole(sample).context_ids:
            return ()
        num_needed = len(taught.context_ids) + len(taught.continuation_ids) + 1
        if num_needed > self.max_len:  # Cutting it on the left would cut the instruction.
            raise SampleError(
                f"with its instructions the sample needs {num_needed} places of the model's "
                f"{self.max_len}; shorten the context"
            )
        return taught.context_ids


def size_check(
    estimate: Callable[[int, int], "Memory"], limits: TrainerSettings
) -> Callable[[int, int], None]:
    """Raises InvalidRequest for a sample whose step would take more than the cell allows."""

    def check(num_grad_tokens: int, num_read_tokens: int) -> None:
        if num_grad_tokens > limits.max_step_tokens:
            raise InvalidRequest(
                f"the gradient would flow through {num_grad_tokens} tokens and "
                f"trainer.max_step_tokens is {limits.max_step_tokens}; shorten the continuation or "
                "config.grad_context"
            )
        needed = estimate(num_grad_tokens, num_read_tokens).total
        if limits.max_step_bytes is not None and needed > limits.max_step_bytes:
            raise InvalidRequest(
                f"its step needs about {needed // MIB} MiB and trainer.max_step_bytes is "
                f"{limits.max_step_bytes // MIB} MiB; shorten the continuation or "
                "config.grad_context"
            )

    return check
