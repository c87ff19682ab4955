"""Options that several commands take, worded once."""

from typing import Annotated, Any, Final

import typer

from actors.errors import SettingsError

DEFAULT_PORT: Final = 8000

Port = Annotated[
    int, typer.Option("--port", envvar="REVERIE_PORT", help="Port of the door, on 127.0.0.1.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


def pairs_of(given: list[str] | None, form: str) -> dict[str, str]:
    """What `--set` was given, by key; SettingsError for what is not `form` or comes twice."""
    pairs: dict[str, str] = {}
    for each in given or []:
        key, is_pair, value = each.partition("=")
        if not (key and is_pair):
            raise SettingsError(f"--set {each!r}: write it as {form}").about("--set")
        if key in pairs:
            raise SettingsError(f"--set {key}: it is given twice; give it once").about(key)
        pairs[key] = value
    return pairs


def number_or_word(value: str) -> Any:
    """What a word of a command line is in JSON: a number, true, false, null, or itself."""
    import json

    try:
        return json.loads(value)
    except ValueError:
        return value
