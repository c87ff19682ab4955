"""From what a client posts to token ids: which tokens are read and which are learned.

    messages --strip--> chat template --> context text | continuation text --> Example
                                          read           learned

Knows tokenizers, not models, queues or requests. A refused sample is a SampleError that says what
is wrong and what to do; which of a request's samples it was is the caller's to add.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]


class SampleError(ValueError):
    """A sample that cannot be learned as it is."""


@dataclass(frozen=True)
class TopLogprobs:
    """What a teacher thought of each predicted token: its k likeliest entries, by token."""

    ids_tk: tuple[tuple[int, ...], ...]
    logprobs_tk: tuple[tuple[float, ...], ...]
    """Natural logarithms, as the teacher gave them; they need not sum to 1."""


@dataclass(frozen=True)
class Example:
    """Token ids that are read (`context_ids`) and learned (`continuation_ids`).

    Without a context the first continuation token is only read: nothing predicts it. Raises
    SampleError if no token is left to predict.
    """

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    weight: float = 1.0
    """Factor on the loss."""
    rejected_ids: tuple[int, ...] = ()
    """A continuation that is to become less likely, for the objective `preference`."""
    teacher: TopLogprobs | None = None
    """For the objective `distill`; one row for each predicted token."""

    def __post_init__(self) -> None:
        if not self.continuation_ids:
            raise SampleError("the continuation is empty; give the text or tokens to learn")
        if self.num_predicted == 0:
            raise SampleError(
                "one continuation token without a context predicts nothing; "
                "give a context or a longer continuation"
            )

    @property
    def num_predicted(self) -> int:
        """Number of tokens in the loss."""
        return len(self.continuation_ids) - (not self.context_ids)


def strip_instructions(
    messages: Sequence[Mapping[str, Any]], roles: Sequence[str] = ()
) -> list[dict[str, str]]:
    """The messages as they are learned from: role and content, without instructions.

    A message is an instruction if its role is in `roles` or its `strip` is true; where `strip` is a
    list of (start, end) spans, those characters are. A message left without content goes too.
    Raises SampleError for spans that overlap or reach beyond the content.
    """
    left = []
    for index, message in enumerate(messages):
        role, content, strip = message["role"], message["content"], message.get("strip") or []
        if role in roles or strip is True:
            continue
        end_of_last, pieces = 0, []
        for start, end in sorted(strip):
            if not end_of_last <= start < end <= len(content):
                raise SampleError(
                    f"messages[{index}].strip has the span ({start}, {end}), but its content has "
                    f"{len(content)} characters; give spans inside it that do not overlap"
                )
            pieces.append(content[end_of_last:start])
            end_of_last = end
        kept = "".join([*pieces, content[end_of_last:]])
        if kept.strip() or not strip:
            left.append({"role": role, "content": kept})
    return left


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    strip: Sequence[str] = (),
    *,
    is_finished: bool = True,
) -> Example:
    """Learn the last message, the assistant's, after the messages before it without instructions.

    The context is the chat template with the generation prompt, as at serving time, applied after
    `strip_instructions`; the continuation is what the template adds to it, up to and including the
    end-of-turn token, or, if the answer is not finished, up to its last word. Raises SampleError.
    """
    if not messages:
        raise SampleError("there are no messages; end them with the assistant message to learn")
    *before, answer = messages
    if all(message["role"] != "assistant" for message in messages):
        raise SampleError("there is no assistant message; end with the one that is to be learned")
    if answer["role"] != "assistant":
        raise SampleError(
            f"the last message has role {answer['role']!r}; end with the assistant message to learn"
        )
    if not answer["content"].strip():
        raise SampleError("the assistant message is empty; give the answer that is to be learned")
    if answer.get("strip"):
        raise SampleError(
            "the answer that is to be learned cannot be stripped; mark other messages"
        )
    learned = {"role": "assistant", "content": answer["content"]}
    context, full = _render(tokenizer, strip_instructions(before, strip), learned)
    if not full.startswith(context):
        raise SampleError(
            "the chat template renders the messages before the answer differently once the answer "
            "follows; send this sample as context and continuation"
        )
    continuation, said = full.removeprefix(context), answer["content"].rstrip()
    if not is_finished:
        if said not in continuation:
            raise SampleError(
                "the chat template rewrites the answer, so that it cannot be cut where it ends; "
                "send this sample as context and continuation"
            )
        continuation = continuation[: continuation.rindex(said) + len(said)]
    continuation_ids = _tokenize(tokenizer, continuation)
    context_ids = _tokenize(tokenizer, context)
    return Example(tuple(context_ids), tuple(_end_of_turn(tokenizer, continuation_ids)))


def encode_text(tokenizer: "PreTrainedTokenizerBase", context: str, continuation: str) -> Example:
    """Learn `continuation` after `context`, both plain text, tokenised apart.

    The context starts with the tokens that the tokenizer puts before any text, as `/v1/completions`
    does; no end-of-turn token is added. Raises SampleError.
    """
    context_ids = _tokenize(tokenizer, context, add_special_tokens=True)
    return Example(tuple(context_ids), tuple(_tokenize(tokenizer, continuation)))


def check_ids(
    context_ids: Sequence[int], continuation_ids: Sequence[int], vocab_size: int
) -> Example:
    """Take ready token ids; raises SampleError with the first that is not in the vocabulary."""
    for field, ids in (("context_ids", context_ids), ("continuation_ids", continuation_ids)):
        for index, value in enumerate(ids):
            if not 0 <= value < vocab_size:
                raise SampleError(
                    f"{field}[{index}]={value} is not a token; ids are 0 to {vocab_size - 1}"
                )
    return Example(tuple(context_ids), tuple(continuation_ids))


def truncate(example: Example, max_len: int) -> Example:
    """At most `max_len` tokens, cut from the left of the context; the continuation stays whole.

    Raises SampleError if the continuation, and one token of a context, do not fit.
    """
    num_needed = len(example.continuation_ids) + bool(example.context_ids)
    if num_needed > max_len:
        raise SampleError(
            f"the continuation has {len(example.continuation_ids)} tokens and needs {num_needed} "
            f"places of the model's {max_len}; split or shorten it"
        )
    num_kept = min(len(example.context_ids), max_len - len(example.continuation_ids))
    return replace(example, context_ids=example.context_ids[len(example.context_ids) - num_kept :])


def _render(
    tokenizer: "PreTrainedTokenizerBase", before: Messages, answer: Mapping[str, str]
) -> tuple[str, str]:
    """The conversation up to the answer, and with it."""

    def render(messages: Messages, add_generation_prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )

    try:
        full = render([*before, answer])
        if before:
            return render(before, add_generation_prompt=True), full
        # Templates refuse an empty conversation: cut after the generation prompt, wherever it is.
        probe = [{"role": "user", "content": "?"}]
        prompt = render(probe, add_generation_prompt=True).removeprefix(render(probe))
    except (ValueError, TemplateError) as error:
        raise SampleError(
            f"the model's chat template refuses these messages ({error}); "
            "change their roles or send context and continuation"
        ) from None
    head, mark, _ = full.partition(prompt) if prompt else ("", "", "")
    return head + mark, full


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool = False
) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            f"the text is not valid Unicode ({error.reason}); fix its escapes"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return ids


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    """`ids` without the white space that a template writes after its end-of-turn token."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = max((index for index, token in enumerate(ids) if token in special), default=len(ids)) + 1
    return ids[:end] if not tokenizer.decode(ids[end:]).strip() else ids
