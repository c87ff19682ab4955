"""What is read of an exchange, and which are not kept: the bodies are those of vLLM 0.32."""

import json
from typing import Any

import pytest

from actors.dream.exchange import Exchange, NotPlain, memory_spans, read

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why?"}
CHUNK = '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":'


def choice(content: str | None = "So.", **changes: Any) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    message["tool_calls"] = []
    whole = {"index": 0, "message": message, "finish_reason": "stop", "stop_reason": None}
    return whole | changes


def exchange(request: Any, *choices: Any) -> Exchange:
    reply = {"id": "chatcmpl-1", "choices": list(choices or (choice(),)), "usage": {}}
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return Exchange(body, json.dumps(reply).encode(), False, 1, 1, True, 0.0)


def stream(*lines: str) -> Exchange:
    answer = "".join(f"data: {line}\n\n" for line in lines) + ": weights_version first=1 last=1\n\n"
    body = json.dumps({"messages": [SYSTEM, USER], "stream": True}).encode()
    return Exchange(body, answer.encode(), True, 1, 1, True, 0.0)


def piece(content: str, end: str | None = None) -> str:
    made = [{"index": 0, "delta": {"content": content}, "finish_reason": end, "stop_reason": None}]
    return f"{CHUNK}{json.dumps(made)}}}"


FIRST = CHUNK + '[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
USAGE = CHUNK + '[],"usage":{"prompt_tokens":3,"total_tokens":5}}'


def test_a_chat_is_its_messages_with_the_instructions_marked_and_the_answer() -> None:
    request = {
        "model": "m",
        "messages": [
            SYSTEM,
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello.", "refusal": None, "annotations": []},
            {"role": "developer", "content": "In French."},
            USER,
        ],
        "temperature": 0.5,
        "max_tokens": 9,
        "tools": None,
    }
    said = read(exchange(request), [])
    assert [(turn["role"], turn["strip"]) for turn in said.turns] == [
        ("system", True),
        ("user", False),
        ("assistant", False),
        ("developer", True),
        ("user", False),
    ]
    assert said.answer == "So."


def test_a_stream_is_put_together() -> None:
    said = read(stream(FIRST, piece("It "), piece("is."), piece("", "stop"), USAGE, "[DONE]"), [])
    assert said.answer == "It is."


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ((FIRST, piece("It"), piece("", "stop")), "cut off"),
        ((FIRST, piece("It"), "[DONE]"), "cut off"),
        ((FIRST, piece("It"), piece("", "length"), "[DONE]"), "did not come to its end"),
        ((FIRST, piece("", "stop"), "[DONE]"), "is empty"),
        ((FIRST, '{"error": {"message": "engine died"}}', "[DONE]"), "cannot be read"),
        ((FIRST, "{", "[DONE]"), "cannot be read"),
    ],
)
def test_a_stream_that_is_not_whole_is_not_kept(lines: tuple[str, ...], says: str) -> None:
    with pytest.raises(NotPlain, match=says):
        read(stream(*lines), [])


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"messages": [USER]}, "no instruction was in view"),
        ({"messages": [{"role": "system", "content": " "}, USER]}, "no instruction was in view"),
        ({"messages": [SYSTEM]}, "does not end with a question"),
        ({"messages": [USER, SYSTEM]}, "does not end with a question"),
        ({"messages": []}, "does not end with a question"),
        ({}, "no messages"),
        ([], "no messages"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        ({"messages": [SYSTEM, USER], "n": 2}, "several answers"),
        ({"messages": [SYSTEM, USER], "tools": [{}]}, "asks for 'tools'"),
        ({"messages": [SYSTEM, USER], "response_format": {"type": "json_object"}}, "response_fo"),
        ({"messages": [SYSTEM, USER], "continue_final_message": True}, "continue_final"),
        ({"messages": [SYSTEM, {"role": "user", "content": [{"type": "text"}]}]}, "not a text"),
        ({"messages": [SYSTEM, {"role": "wizard", "content": "x"}]}, "not a text"),
        ({"messages": [SYSTEM, USER | {"name": "Ann"}]}, "more than a role"),
        (
            {"messages": [SYSTEM, {"role": "tool", "content": "3", "tool_call_id": "1"}]},
            "more than",
        ),
    ],
)
def test_a_request_that_is_no_plain_chat_with_an_instruction_is_not_kept(
    request_: Any, says: str
) -> None:
    with pytest.raises(NotPlain, match=says):
        read(exchange(request_), [])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (choice(finish_reason="length"), "did not come to its end"),
        (choice(stop_reason="\n"), "did not come to its end"),
        (choice(content=" "), "is empty"),
        (choice(content=None), "is empty"),
        (choice(message={"content": "x", "tool_calls": [{"id": "1"}]}), "has 'tool_calls'"),
        (choice(message={"content": "x", "reasoning": "hm"}), "has 'reasoning'"),
    ],
)
def test_an_answer_that_the_model_would_not_write_again_is_not_kept(given: Any, says: str) -> None:
    with pytest.raises(NotPlain, match=says):
        read(exchange({"messages": [SYSTEM, USER]}, given), [])


def test_an_end_by_another_token_of_the_model_is_an_end() -> None:
    read(exchange({"messages": [SYSTEM, USER]}, choice(stop_reason=2)), [])


MEMORIES = ["I grow tomatoes.", "My sister lives in Lisbon.", "cat"]


@pytest.mark.parametrize(
    ("content", "left"),
    [
        (
            "Notes:\n- I grow tomatoes.\n- My sister lives in Lisbon.\nWhat now?",
            "Notes:\nWhat now?",
        ),
        ("What now?\n\nI grow tomatoes.", "What now?\n\n"),
        ("As I said: I grow tomatoes. What now?", "As I said:  What now?"),
        ("I grow tomatoes. My sister lives in Lisbon.\nAnd?", "And?"),
        ("I grow tomatoes.x", "I grow tomatoes.x"),
        ("The cat sleeps.", "The cat sleeps."),
    ],
)
def test_a_memory_that_stands_word_for_word_in_a_question_is_an_instruction(
    content: str, left: str
) -> None:
    kept, end = "", 0
    for begin, until in memory_spans(content, MEMORIES):
        kept, end = kept + content[end:begin], until
    assert kept + content[end:] == left


def test_a_question_that_is_nothing_but_a_memory_stays_a_question() -> None:
    messages = [SYSTEM, {"role": "user", "content": "I grow tomatoes."}]
    assert read(exchange({"messages": messages}), MEMORIES).turns[1]["strip"] is False
    messages = [{"role": "user", "content": "I grow tomatoes.\nWhy?"}]
    assert read(exchange({"messages": messages}), MEMORIES).turns[0]["strip"] == [[0, 17]]


def test_memories_without_end_are_not_sought() -> None:
    with pytest.raises(NotPlain, match="over 256 times"):
        memory_spans("I grow tomatoes. " * 257, MEMORIES)
