"""A client of the door of a running cell, over HTTP, as any other; every refusal in its words.

The key: REVERIE_KEY (or REVERIE_API_KEY), or the file that REVERIE_KEY_FILE names.
"""

import os
import stat
from pathlib import Path
from typing import Any, Final

from actors.errors import ReverieError, SettingsError

ANSWER_TIMEOUT_S: Final = 30
WORK_TIMEOUT_S: Final = 900
"""For routes that do something: a return reads and writes the whole model."""


class Refused(ReverieError):
    """The server said no; the message is its own."""

    def __init__(self, message: str, status: int = 400, kind: str = "server_error") -> None:
        super().__init__(message)
        self.code = status
        self.told = kind


class Unreachable(ReverieError):
    """Nobody answers there, or nobody who is ready: the same command may succeed later."""

    kind = "unreachable_error"


class Server:
    """The door at a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.base = f"http://127.0.0.1:{port}"
        self.key = key()

    def get(self, route: str, **more: Any) -> Any:
        return self.ask("GET", route, timeout_s=ANSWER_TIMEOUT_S, **more)

    def post(self, route: str, body: dict[str, Any] | None = None) -> Any:
        return self.ask("POST", route, body)

    def ask(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None = None,
        timeout_s: float = WORK_TIMEOUT_S,
    ) -> Any:
        """The JSON that the server answers; raises Refused with its words, or Unreachable."""
        import httpx

        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            answer = httpx.request(
                method, self.base + route, headers=headers, json=body, timeout=timeout_s
            )
        except httpx.ReadTimeout:
            raise Unreachable(
                f"port={self.port}: {method} {route} was not answered within {timeout_s:g} s; "
                "see 'reverie status' and 'reverie logs'"
            ).about("port") from None
        except httpx.HTTPError:
            raise nobody(self.port) from None
        return self._read(answer)

    def _read(self, answer: Any) -> Any:
        if answer.status_code == 204:
            return None
        try:
            told = answer.json()
            error = told["error"] if answer.is_error else None
        except (ValueError, KeyError, TypeError):
            raise Unreachable(
                f"port={self.port}: what answers there is no Reverie server "
                f"(status {answer.status_code}); name another with --port or REVERIE_PORT"
            ).about("port") from None
        if error is None:
            return told
        message = str(error["message"])
        if answer.status_code == 503:
            raise Unreachable(message)
        if answer.status_code == 401:
            message = (
                f"{'the key that was given is not known' if self.key else 'the server needs a key'}"
                "; give one of 'reverie keys add' as REVERIE_KEY, or in a file as REVERIE_KEY_FILE"
            )
        refused = Refused(message, answer.status_code, error.get("type", "server_error"))
        raise refused.about(error["param"]) if error.get("param") else refused


def nobody(port: int) -> Unreachable:
    """Nobody listens at `port`."""
    return Unreachable(
        f"port={port}: no server answers; start one with 'reverie up' (or 'make serve'), "
        "or name its port with --port or REVERIE_PORT"
    ).about("port")


def key() -> str | None:
    """The key that the environment names; raises SettingsError for a file that others can read."""
    for name in ("REVERIE_KEY", "REVERIE_API_KEY"):
        if given := os.environ.get(name, "").strip():
            return given
    named = os.environ.get("REVERIE_KEY_FILE")
    if not named:
        return None
    path = Path(named).expanduser()
    try:
        mode = path.stat().st_mode
        read = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingsError(f"REVERIE_KEY_FILE={named}: {reason}; write the key into it").about(
            "REVERIE_KEY_FILE"
        ) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(
            f"REVERIE_KEY_FILE={named}: others can read it; say 'chmod 600 {named}'"
        ).about("REVERIE_KEY_FILE")
    if len(read.split()) != 1:
        raise SettingsError(
            f"REVERIE_KEY_FILE={named}: it holds {len(read.split())} words; write one key into it"
        ).about("REVERIE_KEY_FILE")
    return read
