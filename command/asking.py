"""One question to the model, by the official `openai` client, and its answer as it streams.

The client's stream is read line by line: the last one is Reverie's, a comment that names the newest
version of the weights which the answer was computed from.
"""

import json
import re
from collections.abc import Generator
from typing import Any, Final

from command.client import Refused, Server, Unreachable, nobody

VERSIONS: Final = re.compile(r": weights_version first=(\d+) last=(\d+)")
TIMEOUT_S: Final = 600


class Answer:
    """What has come of an answer so far."""

    def __init__(self) -> None:
        self.text = ""
        self.first_version: int | None = None
        self.last_version: int | None = None
        self.finish: str | None = None
        """Why it ended: `stop`, `length`; None if it was cut off."""

    def as_json(self) -> dict[str, Any]:
        return {
            "answer": self.text,
            "weights_version": self.first_version,
            "weights_version_last": self.last_version,
            "finish_reason": self.finish,
        }


class Model:
    """The served model, as the official client knows it."""

    def __init__(self, server: Server) -> None:
        from openai import OpenAI

        self._server = server
        self._client = OpenAI(
            base_url=f"{server.base}/v1",
            api_key=server.key or "none",
            max_retries=0,
            timeout=TIMEOUT_S,
        )
        self.name = str(server.get("/v1/models")["data"][0]["id"])

    def ask(self, messages: list[dict[str, Any]], answer: Answer, **options: Any) -> Generator[str]:
        """Pieces of the answer's text; `answer` is filled meanwhile.

        Raises Refused or Unreachable. To close it early ends the request.
        """
        import httpx
        from openai import APIConnectionError, APIStatusError

        create: Any = self._client.chat.completions.with_streaming_response.create
        try:
            with create(model=self.name, messages=messages, stream=True, **options) as response:
                answer.first_version = _number(response.headers.get("x-weights-version"))
                for line in response.iter_lines():
                    if piece := _read(line, answer):
                        answer.text += piece
                        yield piece
        except APIStatusError as error:
            told = _told(error.response)
            if error.status_code == 503:
                raise Unreachable(told) from None
            raise Refused(told, error.status_code) from None
        except APIConnectionError:
            raise nobody(self._server.port) from None
        except httpx.HTTPError:
            raise Unreachable(
                "the answer was cut off: the cell restarts by itself; ask again"
            ) from None


def _read(line: str, answer: Answer) -> str:
    """The text that one line of the stream brings."""
    if found := VERSIONS.match(line):
        answer.last_version = int(found[2])
    if not line.startswith("data:") or line.endswith("[DONE]"):
        return ""
    event = json.loads(line.removeprefix("data:"))
    if error := event.get("error"):
        raise Refused(str(error.get("message", error)))
    for choice in event.get("choices", ()):
        answer.finish = choice.get("finish_reason") or answer.finish
        return str(choice["delta"].get("content") or "")
    return ""


def _told(response: Any) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
