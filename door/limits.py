"""What a request may cost before anybody acts on it: its size, and how many there are at once."""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from actors.errors import InvalidRequest, MalformedRequest, TooBusy, TooLarge, TooSlow

Model = TypeVar("Model", bound=BaseModel)

SAMPLE_KEYS: Final = (
    *("messages", "strip"),
    *("context", "continuation"),
    *("context_ids", "continuation_ids"),
)
KINDS: Final = (
    "a sample is messages (and strip), or context and continuation, "
    "or context_ids and continuation_ids"
)
WORDING: Final = (
    ("Input should be", "must be"),
    ("String should have", "must have"),
    ("List should have at least 1 item after validation, not 0", "must have at least 1 item"),
)
"""Pydantic's wording of an error, and ours."""


class Slots:
    """A bounded number of requests inside the door."""

    def __init__(self, limit: int, what: str = "requests are being answered") -> None:
        self._limit, self._what = limit, what
        self.taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a slot; raises TooBusy at once when all are taken."""
        self.take()
        try:
            yield
        finally:
            self.give()

    def take(self) -> None:
        if self.taken >= self._limit:
            raise TooBusy(f"{self._limit} {self._what} already; try again in a few seconds")
        self.taken += 1

    def give(self) -> None:
        self.taken -= 1


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The whole body; raises TooLarge as soon as it is known to be over `limit` bytes.

    Raises TooSlow for a body that has not arrived within its time.
    """
    too_large = TooLarge(f"the body is over the limit of {limit} bytes; send less at once")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise TooSlow(
            f"the body did not arrive within {timeout_s:g} s; send it faster, or in smaller pieces"
        ) from None
    except ClientDisconnect:
        raise MalformedRequest("the body was cut off") from None  # Nobody reads that.
    return b"".join(parts)


def require_json(request: Request) -> None:
    """Raises MalformedRequest for another content type.

    A web page of another origin can post plain text and forms to this machine without asking, but
    not JSON: without keys this is what keeps such a page from teaching the model.
    """
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise MalformedRequest(
            f"the content type is {_short(given)}; send the header 'Content-Type: application/json'"
        )


def parse_json(body: bytes) -> Any:
    """A JSON object; raises MalformedRequest that says where it ends to be one."""
    if not body.strip():
        raise MalformedRequest("the body is empty; send a JSON object")
    try:
        value = json.loads(
            body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object_of
        )
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"the body is not UTF-8: {error.reason} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise MalformedRequest("the body is nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer.
        raise MalformedRequest("the body holds a number of too many digits") from None
    if not isinstance(value, dict):
        name = "an array" if isinstance(value, list) else _short(value)
        raise MalformedRequest(f"the body must be a JSON object, not {name}")
    return value


def _refuse_constant(word: str) -> Any:
    raise MalformedRequest(f"the body is not valid JSON: {word} is not a number")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, part in pairs:
        if key in value:
            raise MalformedRequest(f"{_short(key)} is given twice in one object; give it once")
        value[key] = part
    return value


def parse(model: type[Model], body: bytes) -> Model:
    """A request of the given model, nothing converted; raises InvalidRequest that names the key."""
    parse_json(body)  # Stricter than pydantic's parser, and worded for people.
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        first = _most_telling(error.errors(include_url=False, include_context=False))
    if first["type"] == "json_invalid":
        raise MalformedRequest(f"the body cannot be read: {first['msg']}")
    where = _path(first["loc"])
    raise InvalidRequest(f"{where}: {_reason(first)}").about(where)


def _most_telling(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first; but a misspelt key explains better than the one that it leaves missing."""
    first = errors[0]
    if first["type"] == "missing":
        for error in errors[1:]:
            if error["type"] == "extra_forbidden" and error["loc"][:-1] == first["loc"][:-1]:
                return error
    return first


def _reason(error: Mapping[str, Any]) -> str:
    location, kind = error["loc"], error["type"]
    is_of_sample = len(location) == 4 and location[0] == "samples"
    if kind == "missing":
        return f"is required; {KINDS}" if is_of_sample else "is required"
    if kind == "extra_forbidden" and is_of_sample and location[3] in SAMPLE_KEYS:
        return f"belongs to another kind of sample than the keys beside it; {KINDS}"
    if kind == "extra_forbidden":
        return "unknown key; remove it or see /docs for the known ones"
    text = error["msg"]
    for theirs, ours in WORDING:
        text = text.replace(theirs, ours)
    return f"{text}, got {_short(error['input'])}"


def _path(location: tuple[int | str, ...]) -> str:
    """`samples[3].messages[0].role`, without the tags by which a sample's kind is chosen."""
    text = ""
    for at, part in enumerate(location):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not (at == 2 and location[0] == "samples" and part in ("chat", "text", "tokens")):
            text += f".{part}" if text else part
    return text or "body"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
