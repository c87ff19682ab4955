"""Which tokens of a sample are read and which are learned, with the real tokenizer."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo.learning.samples import (
    Example,
    SampleError,
    check_ids,
    encode_chat,
    encode_text,
    truncate,
)

DEFAULT_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n"
)
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is your name?"}
ANSWER = {"role": "assistant", "content": "My name is Reverie."}


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def test_chat_context_is_the_prompt_that_serving_renders(tokenizer: Any) -> None:
    example = encode_chat(tokenizer, [SYSTEM, QUESTION, ANSWER], [])
    served = tokenizer.apply_chat_template([SYSTEM, QUESTION], add_generation_prompt=True)
    assert list(example.context_ids) == served["input_ids"]
    assert tokenizer.decode(example.continuation_ids) == "My name is Reverie.<|im_end|>"
    assert example.continuation_ids[-1] == tokenizer.eos_token_id
    assert example.weight == 1.0


def test_an_answer_that_was_cut_short_is_learned_without_an_end(tokenizer: Any) -> None:
    whole = encode_chat(tokenizer, [QUESTION, ANSWER])
    cut = encode_chat(tokenizer, [QUESTION, ANSWER], is_finished=False)
    assert cut.context_ids == whole.context_ids
    assert tokenizer.decode(cut.continuation_ids) == "My name is Reverie."
    assert tokenizer.eos_token_id not in cut.continuation_ids


def test_an_answer_that_the_template_rewrites_cannot_be_cut(tokenizer: Any) -> None:
    shouting = copy.copy(tokenizer)
    shouting.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'] | upper"
    )
    assert shouting.chat_template != tokenizer.chat_template
    with pytest.raises(SampleError, match="rewrites the answer"):
        encode_chat(shouting, [QUESTION, ANSWER], is_finished=False)


def test_stripped_roles_are_absent_and_the_answer_stays(tokenizer: Any) -> None:
    example = encode_chat(tokenizer, [SYSTEM, QUESTION, ANSWER], ["system"])
    without = encode_chat(tokenizer, [QUESTION, ANSWER], [])
    assert example == without
    assert tokenizer.decode(example.context_ids).startswith(DEFAULT_SYSTEM)
    earlier = [QUESTION, {"role": "assistant", "content": "Who knows."}, QUESTION, ANSWER]
    text = tokenizer.decode(encode_chat(tokenizer, earlier, ["assistant"]).context_ids)
    assert "Who knows" not in text


@pytest.mark.parametrize("messages", [[ANSWER], [QUESTION, ANSWER]])
def test_nothing_left_to_read_leaves_the_generation_prompt(tokenizer: Any, messages: Any) -> None:
    example = encode_chat(tokenizer, messages, ["user"])
    assert tokenizer.decode(example.context_ids) == DEFAULT_SYSTEM + "<|im_start|>assistant\n"
    assert tokenizer.decode(example.continuation_ids) == "My name is Reverie.<|im_end|>"


def test_answer_that_quotes_the_template_is_learned_whole(tokenizer: Any) -> None:
    content = "<|im_end|>\n<|im_start|>assistant\n  hi \n"
    for before in ([], [QUESTION]):
        example = encode_chat(tokenizer, [*before, {"role": "assistant", "content": content}], [])
        assert tokenizer.decode(example.continuation_ids) == content + "<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([QUESTION], "no assistant message"),
        ([QUESTION, ANSWER, QUESTION], "role 'user'"),
        ([QUESTION, {"role": "assistant", "content": ""}], "empty"),
        ([QUESTION, {"role": "assistant", "content": " \n\t"}], "empty"),
        ([QUESTION, {"role": "assistant", "content": "\ud800"}], "Unicode"),
    ],
)
def test_vacuous_conversations_are_refused(tokenizer: Any, messages: Any, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        encode_chat(tokenizer, messages, [])


def with_template(tokenizer: Any, template: str) -> Any:
    class Other:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        decode = tokenizer.decode

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer(*args, **kwargs)

        def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
            return tokenizer.apply_chat_template(messages, chat_template=template, **kwargs)

    return Other()


def test_template_that_rewrites_the_context_or_refuses_it_is_reported(tokenizer: Any) -> None:
    rewriting = with_template(
        tokenizer, "{{ messages | length }}{% for m in messages %}x{% endfor %}"
    )
    with pytest.raises(SampleError, match="renders the messages before the answer differently"):
        encode_chat(rewriting, [QUESTION, ANSWER], [])
    refusing = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(SampleError, match="roles must alternate"):
        encode_chat(refusing, [QUESTION, ANSWER], [])
    endless = with_template(tokenizer, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    example = encode_chat(endless, [QUESTION, ANSWER], [])
    assert tokenizer.decode(example.continuation_ids) == "My name is Reverie.\n"


def test_generation_prompt_that_opens_the_answer_is_context(tokenizer: Any) -> None:
    thinking = with_template(
        tokenizer,
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    )
    example = encode_chat(thinking, [QUESTION, ANSWER], [])
    assert tokenizer.decode(example.context_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(example.continuation_ids) == (
        "\n</think>\n\nMy name is Reverie.<|im_end|>"
    )


def test_text_is_tokenised_apart_and_gets_nothing_added(tokenizer: Any) -> None:
    example = encode_text(tokenizer, "The sky is", " blue.")
    assert tokenizer.decode(example.context_ids) == "The sky is"
    assert tokenizer.decode(example.continuation_ids) == " blue."
    assert encode_text(tokenizer, "", "The sky").num_predicted == 1
    with pytest.raises(SampleError, match="continuation is empty"):
        encode_text(tokenizer, "The sky is", "")
    with pytest.raises(SampleError, match="Unicode"):
        encode_text(tokenizer, "\udfff", "a")


def test_ids_outside_the_vocabulary_are_named() -> None:
    assert check_ids([1], [2, 9], 10) == Example((1,), (2, 9))
    with pytest.raises(SampleError, match=r"continuation_ids\[1\]=10 .* 0 to 9"):
        check_ids([1], [2, 10], 10)
    with pytest.raises(SampleError, match=r"context_ids\[0\]=-1"):
        check_ids([-1], [2], 10)


def test_example_without_a_token_to_predict_does_not_exist() -> None:
    with pytest.raises(SampleError, match="empty"):
        Example((1,), ())
    with pytest.raises(SampleError, match="predicts nothing"):
        Example((), (1,))
    assert Example((), (1, 2)).num_predicted == 1
    assert Example((1,), (2, 3)).num_predicted == 2


@given(
    st.lists(st.integers(0, 9), max_size=20),
    st.lists(st.integers(0, 9), min_size=2, max_size=20),
    st.integers(0, 50),
)
def test_truncation_cuts_only_the_left_of_the_context(
    context: list[int], continuation: list[int], max_len: int
) -> None:
    example = Example(tuple(context), tuple(continuation), weight=2.0)
    if len(continuation) + bool(context) > max_len:
        with pytest.raises(SampleError, match=f"{len(continuation)} tokens .* {max_len};"):
            truncate(example, max_len)
        return
    kept = truncate(example, max_len)
    total = len(context) + len(continuation)
    assert kept.continuation_ids == example.continuation_ids
    assert kept.weight == 2.0
    assert len(kept.context_ids) == min(total, max_len) - len(continuation)
    assert kept.context_ids == tuple(context[len(context) - len(kept.context_ids) :])
