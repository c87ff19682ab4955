"""What a posted sample becomes for each objective, under templates of six styles."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from actors.encoding import Encoder
from actors.errors import InvalidRequest
from actors.messages import TrainingSample
from actors.posted import Sample, TrainConfig
from apollo.learning.samples import SampleError, encode_chat, strip_instructions

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is your name?"}
ANSWER = {"role": "assistant", "content": "My name is Reverie."}
CHAT = {"messages": [SYSTEM, QUESTION, ANSWER]}

# Written here in the styles of well-known models; the tokens that they use need not be special.
TEMPLATES = {
    "tagged turns": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "headers and trimmed content": (
        "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}"
        "<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
    ),
    "instructions in brackets, system inside the first": (
        "<s>{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }} [/INST]"
        "{% set ns.system = '' %}{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "assistant under another name, everything trimmed": (
        "<bos>{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>model\n{% endif %}"
    ),
    "empty thoughts before every last answer": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "a role a line": (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, tokenizer.vocab_size, 256)


def encode(encoder: Encoder, posted: dict[str, Any], objective: str = "sft") -> TrainingSample:
    sample: Any = TypeAdapter(Sample).validate_python(posted)
    return encoder.encode(sample, 0, TrainConfig.model_validate({"objective": objective}))


@pytest.mark.parametrize("style", TEMPLATES)
def test_boundary_is_where_serving_ends_its_prompt_under_every_template(
    tokenizer: Any, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[style])
    padded = {"role": "assistant", "content": "  My name is Reverie.  "}
    for answer in (ANSWER, padded):
        example = encode_chat(tokenizer, [SYSTEM, QUESTION, answer])
        served = tokenizer.apply_chat_template([SYSTEM, QUESTION], add_generation_prompt=True)
        assert list(example.context_ids) == served["input_ids"]
        learned = tokenizer.decode(example.continuation_ids)
        assert "My name is Reverie." in learned and "think" not in learned
        whole = tokenizer.apply_chat_template([SYSTEM, QUESTION, answer], tokenize=False)
        text = tokenizer.decode(example.context_ids) + learned
        assert whole.startswith(text) and not whole.removeprefix(text).strip()


@pytest.mark.parametrize("style", TEMPLATES)
def test_stripped_sample_equals_one_that_never_had_the_instruction(
    tokenizer: Any, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[style])
    marked = SYSTEM | {"strip": True}
    without = encode_chat(tokenizer, [QUESTION, ANSWER])
    assert encode_chat(tokenizer, [marked, QUESTION, ANSWER]) == without
    assert encode_chat(tokenizer, [SYSTEM, QUESTION, ANSWER], ["system"]) == without
    asked = QUESTION | {"content": "Be brief. " + QUESTION["content"], "strip": [[0, 10]]}
    assert encode_chat(tokenizer, [asked, ANSWER]) == without


def test_template_that_opens_a_thought_which_the_answer_lacks_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking = TEMPLATES["tagged turns"].replace(
        "assistant\n{% endif", "assistant\n<think>\n{% endif"
    )
    monkeypatch.setattr(tokenizer, "chat_template", thinking)
    with pytest.raises(SampleError, match="send this sample as context and continuation"):
        encode_chat(tokenizer, [QUESTION, ANSWER])


def test_instructions_are_stripped_by_role_by_message_and_by_span() -> None:
    text = "Answer in French. Where is Paris? No jokes."
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Rules."},
        {"role": "user", "content": "Hello."},
        {"role": "user", "content": text, "strip": [[34, 43], [0, 18]]},
        {"role": "user", "content": "Whisper.", "strip": [[0, 8]]},
        {"role": "user", "content": "Shout.", "strip": True},
        {"role": "assistant", "content": ""},
    ]
    assert strip_instructions(messages, ["system"]) == [
        {"role": "user", "content": "Hello."},
        {"role": "user", "content": "Where is Paris? "},
        {"role": "assistant", "content": ""},
    ]
    assert messages[0] == {"role": "system", "content": "Rules."}


@pytest.mark.parametrize("spans", [[[0, 99]], [[5, 5]], [[0, 6], [5, 8]], [[7, 3]]])
def test_spans_that_overlap_or_leave_the_text_are_refused(spans: Any) -> None:
    with pytest.raises(SampleError, match=r"messages\[0\].strip has the span"):
        strip_instructions([{"role": "user", "content": "Be brief.", "strip": spans}])


def test_answer_itself_cannot_be_stripped(encoder: Encoder) -> None:
    with pytest.raises(InvalidRequest, match="answer that is to be learned cannot be stripped"):
        encode(encoder, {"messages": [QUESTION, ANSWER | {"strip": True}]})


def test_teacher_reads_the_instruction_that_the_learner_does_not(encoder: Encoder) -> None:
    found = encode(encoder, CHAT | {"strip": ["system"]}, "distill")
    with_instruction, without = (
        encode(encoder, CHAT),
        encode(encoder, {"messages": [QUESTION, ANSWER]}),
    )
    assert found.teacher_context_ids == with_instruction.context_ids
    assert found.context_ids == without.context_ids
    assert found.continuation_ids == without.continuation_ids == with_instruction.continuation_ids
    text = encode(
        encoder,
        {"context": "2 + 2 =", "continuation": " 4", "teacher_context": "Add. 2 + 2 ="},
        "distill",
    )
    assert len(text.teacher_context_ids) > len(text.context_ids)
    ids = {"context_ids": [5, 6], "continuation_ids": [7, 8], "teacher_context_ids": [9, 5, 6]}
    assert encode(encoder, ids, "distill").teacher_context_ids == (9, 5, 6)


@pytest.mark.parametrize(
    "posted",
    [CHAT, {"context": "a", "continuation": "b"}, {"context_ids": [1], "continuation_ids": [2, 3]}],
)
def test_distilling_with_nothing_to_strip_is_refused(
    encoder: Encoder, posted: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match=r"samples\[0\].*only the teacher reads"):
        encode(encoder, posted, "distill")


def test_instruction_that_would_be_cut_off_is_refused(encoder: Encoder) -> None:
    long = SYSTEM | {"content": "Be brief. " * 100}
    with pytest.raises(InvalidRequest, match="places of the model's 256"):
        encode(encoder, {"messages": [long, QUESTION, ANSWER], "strip": ["system"]}, "distill")


def test_rejected_answer_follows_the_same_context(encoder: Encoder, tokenizer: Any) -> None:
    found = encode(encoder, CHAT | {"rejected": "I have no name."}, "preference")
    assert tokenizer.decode(found.rejected_ids) == "I have no name.<|im_end|>"
    plain = encode(encoder, CHAT)
    assert (found.context_ids, found.continuation_ids) == (
        plain.context_ids,
        plain.continuation_ids,
    )
    text = {"context": "2 + 2 =", "continuation": " 4", "rejected": " 5"}
    assert tokenizer.decode(encode(encoder, text, "preference").rejected_ids) == " 5"
    ids = {"context_ids": [5, 6], "continuation_ids": [7, 8], "rejected_ids": [7, 9]}
    assert encode(encoder, ids, "preference").rejected_ids == (7, 9)


def test_preference_without_a_rejected_answer_is_refused_and_so_is_one_too_many(
    encoder: Encoder,
) -> None:
    with pytest.raises(InvalidRequest, match="needs a rejected continuation"):
        encode(encoder, CHAT, "preference")
    with pytest.raises(InvalidRequest, match="'preference' only"):
        encode(encoder, CHAT | {"rejected": "No."})
    with pytest.raises(InvalidRequest, match="is the one that is learned"):
        encode(encoder, CHAT | {"rejected": ANSWER["content"]}, "preference")


def test_anchor_is_refused_where_the_template_takes_no_chat(
    tokenizer: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchored = TrainConfig(anchor=1.0)
    encoder.check(anchored)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    encoder.check(TrainConfig())
    with pytest.raises(
        InvalidRequest, match=r"^config\.anchor: the canaries .* leave it out"
    ) as told:
        encoder.check(anchored)
    assert told.value.param == "config.anchor"
