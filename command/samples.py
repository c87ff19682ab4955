"""Samples from a file of JSON lines, checked before anything is posted; errors name the line.

A line is a sample as `POST /train` takes it, or a conversation:

    {"conversation": [{"role": ..., "content": ...}, ...]}      with id, source, weight, strip

of which every answer of the assistant is learned, each after what came before it. Empty lines are
passed over. All of a file is right, or none of it is used.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actors.errors import ReverieError, SettingsError
from actors.home import MIB

CONVERSATION: Final = "conversation"
SHARED_KEYS: Final = ("source", "weight", "strip")
"""Of a conversation, those that each of its samples takes over."""
MAX_FILE_BYTES: Final = 512 * MIB
"""Of text to learn from: months of training, so it is the wrong file."""


@dataclass(frozen=True)
class Line:
    """One sample, and where it comes from."""

    number: int
    sample: dict[str, Any]
    size_bytes: int


def read(path: Path, data: bytes) -> list[Line]:
    """All samples of `data`; raises SettingsError that names file, line, key, value and remedy."""
    if len(data) > MAX_FILE_BYTES:
        raise SettingsError(f"{path}: it has over {MAX_FILE_BYTES} bytes; split it")
    found: list[Line] = []
    first_of: dict[str, int] = {}
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            made = list(_samples(raw))
        except ReverieError as error:
            raise SettingsError(f"{path}:{number}: {error}").about(f"line {number}") from None
        for sample in made:
            name = sample.get("id")
            if name is not None and first_of.setdefault(name, number) != number:
                raise SettingsError(
                    f"{path}:{number}: id: {name!r} is that of line {first_of[name]}; "
                    "give each sample its own, or none"
                ).about(f"line {number}")
            found.append(Line(number, sample, len(raw)))
    if not found:
        raise SettingsError(f"{path}: it holds no samples; write one JSON object a line")
    return found


def _samples(raw: bytes) -> Iterator[dict[str, Any]]:
    from door.limits import parse_json

    try:
        value = parse_json(raw)
    except ReverieError as error:
        raise SettingsError(str(error).replace("the body", "the line")) from None
    is_conversation = CONVERSATION in value
    for sample in _turns(value) if is_conversation else [value]:
        _check(sample, is_conversation)
        yield sample


def _check(sample: dict[str, Any], is_conversation: bool) -> None:
    """As the server would; the path of an error begins inside of the sample."""
    from actors.posted import TrainRequest
    from door.limits import parse

    try:
        parse(TrainRequest, json.dumps({"samples": [sample]}).encode())
    except ReverieError as error:
        told = str(error).removeprefix("samples[0]").removeprefix(".")
        if is_conversation:
            told = told.replace("messages[", f"{CONVERSATION}[", 1)
        raise SettingsError(told.removeprefix(": ")) from None


def _turns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """A sample for each answer of a conversation."""
    unknown = value.keys() - {CONVERSATION, "id", *SHARED_KEYS}
    if unknown:
        raise SettingsError(
            f"{min(unknown)}: unknown key beside {CONVERSATION}; "
            f"it takes id, {', '.join(SHARED_KEYS)}"
        )
    turns = value[CONVERSATION]
    if not isinstance(turns, list):
        raise SettingsError(f"{CONVERSATION}: must be a list of messages")
    shared: dict[str, Any] = {key: value[key] for key in SHARED_KEYS if key in value}
    made: list[dict[str, Any]] = []
    for at, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise SettingsError(f"{CONVERSATION}[{at}]: must be an object of role and content")
        if turn.get("role") == "assistant":
            name = {"id": f"{value['id']}-{len(made) + 1}"} if "id" in value else {}
            made.append({"messages": turns[: at + 1], **shared, **name})
    if not made:
        raise SettingsError(f"{CONVERSATION}: no message in it is the assistant's; add one")
    if turns[-1].get("role") != "assistant":
        # Checked all the same, so that a mistake in what nobody learns from is no surprise later.
        _check({"messages": [*turns, {"role": "assistant", "content": "."}], **shared}, True)
    return made


def parts(lines: list[Line], max_samples: int, max_bytes: int) -> Iterator[list[Line]]:
    """The lines in their order, so many at once as one request may hold."""
    part: list[Line] = []
    size = 0
    for line in lines:
        if part and (len(part) == max_samples or size + line.size_bytes > max_bytes):
            yield part
            part, size = [], 0
        part.append(line)
        size += line.size_bytes
    yield part
