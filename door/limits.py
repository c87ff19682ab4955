"""What a request may cost before anybody acts on it: its size, and how many there are at once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from actors.errors import InvalidRequest, MalformedRequest, TooBusy, TooLarge

Model = TypeVar("Model", bound=BaseModel)


class Slots:
    """A bounded number of requests inside the door."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
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
            raise TooBusy(
                f"{self._limit} requests are being answered already; try again in a few seconds"
            )
        self.taken += 1

    def give(self) -> None:
        self.taken -= 1


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; raises TooLarge as soon as it is known to be over `limit` bytes."""
    too_large = TooLarge(f"the body is over the limit of {limit} bytes; send less at once")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def parse_json(body: bytes) -> Any:
    """A JSON object; raises MalformedRequest that says where it ends to be one."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MalformedRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise MalformedRequest("the body is nested too deeply") from None
    if not isinstance(value, dict):
        raise MalformedRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def _refuse_constant(word: str) -> Any:
    raise MalformedRequest(f"the body is not valid JSON: {word} is not a number")


def parse(model: type[Model], body: bytes) -> Model:
    """A request of the given model; raises InvalidRequest that names the key and the remedy."""
    value = parse_json(body)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = _path(first["loc"])
        if first["type"] == "extra_forbidden":
            message = f"{where}: unknown key; remove it or see /docs for the known ones"
        elif first["type"] == "missing":
            message = f"{where}: is required"
        else:
            message = f"{where}: {first['msg']}, got {_short(first['input'])}"
        raise InvalidRequest(message).about(where) from None


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
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
