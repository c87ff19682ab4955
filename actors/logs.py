"""What our processes log: plain lines or JSON, each with the ids of what it is about.

    logging.getLogger(...).info(...) --> + role, version, bound ids --> stderr --> Ray's log files

Ids are `request` and `trace` in the ingress, `job` and `trace` where one is learned. A trace leads
from a request to what became of it: see `trace_of`. Texts that were said, and keys, are nobody's
to log; whoever logs sees to that, and a test looks.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from pythonjsonlogger.json import JsonFormatter

from actors.settings import LogSettings

OURS: Final = ("actors", "apollo", "door", "serve_app")
"""Loggers that have the level of the settings; all others warn only."""
PLAIN: Final = "%(asctime)s %(levelname)s %(role)s: %(message)s"
_NAMED: Final = {"levelname": "level", "name": "logger"}
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_NO_TRACE: Final = "0" * 32

_ids: ContextVar[Mapping[str, str]] = ContextVar("ids", default={})  # noqa: B039


def bind(**ids: str | None) -> None:
    """From here on in this task or thread, lines are about these; None is left out."""
    _ids.set({name: value for name, value in ids.items() if value})


@contextmanager
def bound(**ids: str | None) -> Iterator[None]:
    """Lines within are about these, and about nothing else."""
    token = _ids.set({})
    try:
        bind(**ids)
        yield
    finally:
        _ids.reset(token)


def bound_ids() -> Mapping[str, str]:
    """What this task or thread works on."""
    return _ids.get()


def trace_of(traceparent: str | None, request: str) -> str:
    """The trace-id of a W3C `traceparent`; the request's own id where there is none that is valid.

    https://www.w3.org/TR/trace-context/
    """
    found = _TRACEPARENT.fullmatch(traceparent or "")
    if found is None or found[1] == _NO_TRACE or (traceparent or "").startswith("ff"):
        return request
    return found[1]


def configure(settings: LogSettings, role: str, version: Callable[[], int | None]) -> None:
    """Have this process log as the settings say; `version` tells that of the live weights.

    A second call replaces what the first one did.
    """
    handler = _Ours(sys.__stderr__)  # Serve puts something else in the place of sys.stderr.
    handler.addFilter(_Ids(role, version))
    handler.setFormatter(_json() if settings.format == "json" else _Plain(PLAIN))
    root = logging.getLogger()
    for known in [each for each in root.handlers if isinstance(each, _Ours)]:
        root.removeHandler(known)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(settings.level)


def _json() -> logging.Formatter:
    fields = ["levelname", "name", "message", "role", "version"]
    return JsonFormatter(fields, rename_fields=_NAMED, timestamp="time", json_ensure_ascii=True)


class _Ours(logging.StreamHandler[Any]):
    """Known again by its class."""


class _Ids(logging.Filter):
    """Adds what a line is about."""

    def __init__(self, role: str, version: Callable[[], int | None]) -> None:
        super().__init__()
        self._role, self._version = role, version

    def filter(self, record: logging.LogRecord) -> bool:
        record.role = self._role
        for name, value in {**bound_ids(), "version": self._version()}.items():
            record.__dict__.setdefault(name, value)
        return True


class _Plain(logging.Formatter):
    """The message, then what it is about: `commit (generation=3 seconds=0.2 version=24)`."""

    _KNOWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "role"}

    def formatMessage(self, record: logging.LogRecord) -> str:
        # Ray adds a fact of its own to every record, with a "_" before its name.
        facts = {
            key: value
            for key, value in vars(record).items()
            if key not in self._KNOWN and key[0] != "_" and value is not None
        }
        said = " ".join(f"{key}={_word(value)}" for key, value in facts.items())
        return super().formatMessage(record) + (f" ({said})" if said else "")


def _word(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[!-~]+", text, re.ASCII) else json.dumps(text)
