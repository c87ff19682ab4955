"""Declarative checks of an answer's text, and why an answer fails them.

Knows text, numbers and patterns, no model. What a client posts here is run on every answer, so
nothing in it can hang, grow or reach out: patterns run with a time limit, alternatives nest to a
bound, and a JSON schema is refused if it points anywhere.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final, Self

import regex
from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.validators import extend
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

PATTERN_TIMEOUT_S: Final = 0.1
"""Longest search for one pattern; one that takes longer does not hold."""
MAX_PATTERN_CHARS: Final = 500
MAX_TEXT_CHARS: Final = 4_000
"""Longest literal that an answer may be asked to have."""
MAX_QUOTED_CHARS: Final = 80
"""Longest piece of an answer or a check that a reason repeats."""
MAX_LIST: Final = 32
"""Most patterns, choices or alternatives in one list."""
MAX_DEPTH: Final = 3
"""Deepest nesting of `any_of`."""
MAX_SCHEMA_CHARS: Final = 8_000
"""Longest JSON schema, written as JSON; without references its cost stays in proportion."""
POINTERS: Final = ("$ref", "$dynamicRef")


def _check_pattern(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        place = "" if error.pos is None else f" at position {error.pos}"
        raise ValueError(f"{pattern!r} is no regular expression: {error.msg}{place}") from None
    return pattern


def _check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        num_chars = len(json.dumps(schema))
    except RecursionError:
        raise ValueError("the schema is nested too deep") from None
    if num_chars > MAX_SCHEMA_CHARS:
        raise ValueError(f"the schema has {num_chars} characters, at most {MAX_SCHEMA_CHARS}")
    for part in _objects_of(schema):
        for key in POINTERS:
            if isinstance(part.get(key), str):
                raise ValueError(
                    f"{key} to {part[key]!r}: references are not followed; write the schema out"
                )
        if isinstance(part.get("pattern"), str):
            _check_pattern(part["pattern"])
        if isinstance(part.get("patternProperties"), dict):
            raise ValueError("patternProperties is not supported; name the properties")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"no JSON schema (2020-12): {error.json_path}: {error.message}") from None
    return schema


def _objects_of(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, dict | list):
            yield from _objects_of(part)


Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]
Pattern = Annotated[
    str, Field(min_length=1, max_length=MAX_PATTERN_CHARS), AfterValidator(_check_pattern)
]


class Checks(BaseModel):
    """What an answer must look like; everything that is given must hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_words: int | None = Field(default=None, ge=1)
    min_words: int | None = Field(default=None, ge=1)
    must_match: list[Pattern] = Field(default=[], max_length=MAX_LIST)
    """Regular expressions, each found somewhere in the answer; `(?i)` ignores case."""
    must_not_match: list[Pattern] = Field(default=[], max_length=MAX_LIST)
    """Regular expressions, none found anywhere in the answer."""
    starts_with: Text | None = None
    ends_with: Text | None = None
    json_schema: Annotated[dict[str, Any], AfterValidator(_check_schema)] | None = None
    """The whole answer is JSON that this schema (draft 2020-12, without references) admits."""
    one_of: list[Text] = Field(default=[], max_length=MAX_LIST)
    """The whole answer is one of these."""
    any_of: list["Checks"] = Field(default=[], max_length=MAX_LIST)
    """At least one of these alternatives holds."""

    @property
    def is_empty(self) -> bool:
        """Whether every answer passes."""
        return self == Checks()

    @property
    def depth(self) -> int:
        return 1 + max((choice.depth for choice in self.any_of), default=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.min_words, self.max_words
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_words={low} is above max_words={high}; no answer could pass")
        for index, choice in enumerate(self.any_of):
            if choice.is_empty:
                raise ValueError(f"any_of[{index}] is empty; every answer would pass")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"any_of is nested more than {MAX_DEPTH} deep")
        return self


def failures(text: str, checks: Checks) -> tuple[str, ...]:
    """Why `text` fails, in words; nothing if all of `checks` hold. Space around it is ignored."""
    return tuple(_failures(text.strip(), checks))


def _failures(text: str, checks: Checks) -> Iterator[str]:
    num_words = len(text.split())
    if checks.max_words is not None and num_words > checks.max_words:
        yield f"{num_words} words, at most {checks.max_words}"
    if checks.min_words is not None and num_words < checks.min_words:
        yield f"{num_words} words, at least {checks.min_words}"
    for pattern in checks.must_match:
        if (found := _search(pattern, text)) is not True:
            yield found or f"does not match {_quoted(pattern)}"
    for pattern in checks.must_not_match:
        if found := _search(pattern, text):
            yield f"matches {_quoted(pattern)}" if found is True else found
    if checks.starts_with is not None and not text.startswith(checks.starts_with):
        yield f"does not start with {_quoted(checks.starts_with)}"
    if checks.ends_with is not None and not text.endswith(checks.ends_with):
        yield f"does not end with {_quoted(checks.ends_with)}"
    if checks.json_schema is not None and (fault := _json_fault(text, checks.json_schema)):
        yield fault
    if checks.one_of and text not in checks.one_of:
        yield f"is none of {', '.join(map(_quoted, checks.one_of))}"
    if checks.any_of:
        reasons = [list(_failures(text, choice)) for choice in checks.any_of]
        if all(reasons):
            yield "no alternative holds: " + "; or ".join(" and ".join(each) for each in reasons)


def _search(pattern: str, text: str) -> bool | str:
    """Whether the pattern is found; if that could not be told in time, a sentence about it."""
    try:
        return regex.search(pattern, text, timeout=PATTERN_TIMEOUT_S) is not None
    except TimeoutError:
        return f"{_quoted(pattern)} took longer than {PATTERN_TIMEOUT_S} s"


def _pattern(_: Any, pattern: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    """JSON schema's `pattern` with our time limit, which the library's own has not."""
    if isinstance(value, str) and (found := _search(pattern, value)) is not True:
        yield ValidationError(found or f"{_quoted(value)} does not match {_quoted(pattern)}")


_Validator = extend(Draft202012Validator, {"pattern": _pattern})


def _json_fault(text: str, schema: dict[str, Any]) -> str | None:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        fault = next(_Validator(schema).iter_errors(value), None)
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at position {error.pos}"
    except (ValueError, ArithmeticError, RecursionError) as error:
        return f"is no JSON that can be checked: {error}"
    if fault is None:
        return None
    return f"is not what json_schema asks for: {fault.json_path}: {_short(fault.message)}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _quoted(text: str) -> str:
    return repr(_short(text))


def _short(text: str) -> str:
    return text if len(text) <= MAX_QUOTED_CHARS else text[: MAX_QUOTED_CHARS - 3] + "..."
