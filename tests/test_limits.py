"""Slots, sizes, parsing: what a client sends wrong is refused in words, before it is taken."""

import json
from typing import Any

import pytest

from actors.errors import (
    InvalidRequest,
    MalformedRequest,
    TooBusy,
    TooLarge,
)
from actors.posted import TrainRequest
from door.limits import Slots, parse, parse_json, read_body
from tests.asgi import request_of


def test_slots_are_bounded_and_given_back() -> None:
    slots = Slots(2)
    with slots.one(), slots.one():
        with pytest.raises(TooBusy, match="2 requests"):
            slots.take()
        assert slots.taken == 2
    assert slots.taken == 0


def test_slot_is_given_back_after_an_error() -> None:
    slots = Slots(1)
    with pytest.raises(ZeroDivisionError), slots.one():
        raise ZeroDivisionError
    assert slots.taken == 0


async def test_body_up_to_the_limit_is_read_whole() -> None:
    assert await read_body(request_of(b"12345", b"", b"67890"), 10, 10) == b"1234567890"
    assert await read_body(request_of(b""), 10, 10) == b""


async def test_declared_size_is_refused_before_anything_is_read() -> None:
    with pytest.raises(TooLarge, match="limit of 10 bytes"):
        await read_body(request_of(content_length="11"), 10, 10)  # nothing ever arrives


async def test_streamed_size_is_refused_at_the_first_byte_too_many() -> None:
    for headers in ({}, {"content_length": "5"}, {"content_length": "many"}):
        endless = request_of(b"12345", b"678901", *[b"never read"] * 3, **headers)
        with pytest.raises(TooLarge, match="limit of 10 bytes"):
            await read_body(endless, 10, 10)
        assert (await endless.receive())["body"] == b"never read"


# Parsing.


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": "\xff"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8|JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"3", "must be a JSON object"),
    ],
    ids=lambda value: str(value[:24]),
)
def test_body_that_is_no_json_object_is_malformed(body: bytes, match: str) -> None:
    with pytest.raises(MalformedRequest, match=match):
        parse_json(body)


def test_text_arrives_as_it_was_sent() -> None:
    body = '{"a": "h\u00e9 \U0001f600 \\u00e9 \\ud83d\\ude00", "b": [1, 2.5, null, true]}'.encode()
    expected = "h\u00e9 \U0001f600 \u00e9 \U0001f600"
    assert parse_json(body) == {"a": expected, "b": [1, 2.5, None, True]}


GOOD: dict[str, Any] = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
}


@pytest.mark.parametrize(
    ("samples", "where"),
    [
        ([GOOD, {"messages": [{"role": "robot", "content": "x"}]}], "samples[1].messages[0].role"),
        ([GOOD, {"messages": [{"role": "user"}]}], "samples[1].messages[0].content"),
        ([{"messages": [{"role": "user", "content": 3}]}], "samples[0].messages[0].content"),
        ([{"messages": []}], "samples[0].messages"),
        ([{"messages": "hello"}], "samples[0].messages"),
        ([GOOD | {"strip": ["robot"]}], "samples[0].strip[0]"),
        ([GOOD | {"weight": 0}], "samples[0].weight"),
        ([GOOD | {"weight": 1e999}], "samples[0].weight"),
        ([GOOD | {"id": ""}], "samples[0].id"),
        ([GOOD | {"id": "x" * 129}], "samples[0].id"),
        ([GOOD | {"sorce": "typo"}], "samples[0].sorce"),
        ([{"context": "c"}], "samples[0].continuation"),
        ([{"context": "c", "continuation": None}], "samples[0].continuation"),
        ([{"context_ids": [1], "continuation_ids": [2, -1]}], "samples[0].continuation_ids[1]"),
        ([{"context_ids": [1], "continuation_ids": ["2"]}], "samples[0].continuation_ids[0]"),
        ([GOOD | {"continuation": "both"}], "samples[0]."),
        ([{"context": "c", "continuation": "d", "continuation_ids": [1]}], "samples[0]."),
        ([GOOD, 3], "samples[1]"),
        ([GOOD, [[[]]]], "samples[1]"),
        ([], "samples"),
        ("text", "samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_sample_is_refused_with_its_path(samples: Any, where: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(TrainRequest, json.dumps({"samples": samples}).replace("Infinity", "1e999").encode())
    assert refused.value.param is not None
    if where.endswith("."):
        assert refused.value.param.startswith(where)
    else:
        assert refused.value.param == where
    assert str(refused.value).startswith(f"{refused.value.param}: ")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "samples"),
        ({"samples": [GOOD], "sample": 1}, "sample"),
        ({"samples": [GOOD], "config": {"learning_rte": 1}}, "config.learning_rte"),
        ({"samples": [GOOD], "config": {"learning_rate": -1}}, "config.learning_rate"),
        ({"samples": [GOOD], "config": {"epochs": 0}}, "config.epochs"),
        ({"samples": [GOOD], "config": {"epochs": "3"}}, "config.epochs"),
        ({"samples": [GOOD], "config": {"epochs": 1.5}}, "config.epochs"),
        ({"samples": [GOOD], "config": {"objective": "magic"}}, "config.objective"),
        ({"samples": [GOOD], "config": []}, "config"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_request_is_refused_with_its_path(body: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest, match="^" + where.replace(".", r"\.")) as refused:
        parse(TrainRequest, json.dumps(body).encode())
    assert refused.value.param == where


def test_long_value_is_shown_in_short() -> None:
    body = {"samples": [{"messages": "x" * 100_000}]}
    with pytest.raises(InvalidRequest) as refused:
        parse(TrainRequest, json.dumps(body).encode())
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"samples": [' + b"[" * 150 + b"]" * 150 + b"]}",
        b'{"samples": [' + b"[" * 600 + b"]" * 600 + b"]}",
        b'{"samples": [{"messages": [{"role": "user", "content": "\\ud800"}]}]}',
        b'{"samples": [], "\\ud800": 1}',
        b'{"samples": ' + b"9" * 400 + b"}",
    ],
    ids=["deep", "deeper", "half a character", "half a character as key", "huge number"],
)
def test_odd_body_is_the_clients_fault_and_can_be_answered(body: bytes) -> None:
    with pytest.raises((InvalidRequest, MalformedRequest)) as refused:
        parse(TrainRequest, body)
    json.dumps(str(refused.value), ensure_ascii=False).encode()
