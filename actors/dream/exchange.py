"""An exchange of a client with the model, as bytes went by, is read: the chat, and its answer.

    ingress --Exchange: two bodies of bytes--> read --> Said, or why nothing can be learned of it

Only plain chats are kept, whose answer the model would write again from the messages alone, and
only where an instruction was in view: nothing can be learned of others, so their text is not held.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

INSTRUCTIONS: Final = ("system", "developer")
"""Roles whose messages are there when an answer is written, and gone when it is learned."""
MIN_MEMORY_CHARS: Final = 12
"""A shorter memory may be part of anything."""
MAX_SPANS: Final = 256
_ROLES: Final = (*INSTRUCTIONS, "user", "assistant", "tool")
_PLAIN: Final = frozenset(
    {
        *("model", "messages", "stream", "stream_options", "n", "seed", "user", "priority"),
        *("temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "stop"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("logprobs", "top_logprobs", "store", "metadata", "request_id"),
    }
)
"""Keys of a request that change neither the prompt nor which answers are allowed."""
_WORDS: Final = ("role", "content")

Turn = dict[str, Any]
"""`role`, `content`, and `strip` as in a sample."""


@dataclass(frozen=True)
class Exchange:
    """A request for a chat and the whole answer: produced by the ingress, for the dream actor."""

    body: bytes
    answer: bytes
    is_stream: bool
    first_version: int
    last_version: int
    """Of the weights that answered."""
    may_teach: bool
    """Whether the client could have taught the same by `POST /train`."""
    created: float


@dataclass(frozen=True)
class Said:
    """What an exchange was about."""

    turns: tuple[Turn, ...]
    answer: str


class NotPlain(ValueError):
    """Nothing can be learned of this exchange; the message says why."""


def read(exchange: Exchange, memories: Sequence[str]) -> Said:
    """Raises NotPlain. Instructions, and memories where they stand word for word, are marked."""
    try:
        request = json.loads(exchange.body)
        reply = _of_stream(exchange.answer) if exchange.is_stream else _of_body(exchange.answer)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        if isinstance(error, NotPlain):
            raise
        raise NotPlain("it cannot be read as a chat") from None
    turns = tuple(_marked(turn, memories) for turn in _turns_of(request))
    if not any(turn["strip"] and turn["content"].strip() for turn in turns):
        raise NotPlain("no instruction was in view")
    if all(turn["strip"] is True for turn in turns):
        raise NotPlain("nothing but instructions was in view")
    return Said(turns, reply)


# The request.


def _turns_of(request: Any) -> list[Turn]:
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise NotPlain("it has no messages")
    if others := sorted(key for key in set(request) - _PLAIN if request[key] is not None):
        raise NotPlain(f"it asks for {others[0][:40]!r}")
    if request.get("n") not in (None, 1):
        raise NotPlain("it asks for several answers")
    turns = [_turn_of(each) for each in request["messages"]]
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise NotPlain("it does not end with a question")
    return turns


def _turn_of(message: Any) -> Turn:
    if not isinstance(message, dict) or any(message[key] for key in set(message) - {*_WORDS}):
        raise NotPlain("a message has more than a role and a content")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES or not isinstance(content, str):
        raise NotPlain("a message is not a text of a known role")
    return {"role": role, "content": content, "strip": False}


def _marked(turn: Turn, memories: Sequence[str]) -> Turn:
    if turn["role"] in INSTRUCTIONS:
        return turn | {"strip": True}
    spans = memory_spans(turn["content"], memories) if turn["role"] == "user" else []
    is_all = "".join(_left(turn["content"], spans)).strip() == ""
    return turn | {"strip": False if is_all else spans or False}


def _left(content: str, spans: Sequence[Sequence[int]]) -> list[str]:
    ends = [0, *(end for _, end in spans)]
    starts = [*(begin for begin, _ in spans), len(content)]
    return [content[end:start] for end, start in zip(ends, starts, strict=True)]


def memory_spans(content: str, memories: Sequence[str]) -> list[list[int]]:
    """Where memories stand word for word; with the whole line, if nothing else is said in it."""
    spans: list[list[int]] = []
    for memory in memories:
        words = memory.strip()
        if len(words) >= MIN_MEMORY_CHARS and words in content:
            found = re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", content)
            spans += [[*each.span()] for each in found]
    if len(spans) > MAX_SPANS:
        raise NotPlain(f"memories stand in one message over {MAX_SPANS} times")
    spans, begin = _merged(spans), 0
    lines = []
    for line in content.splitlines(keepends=True):
        end = begin + len(line)
        inside = [[max(at, begin), min(to, end)] for at, to in spans if at < end and to > begin]
        within = [[at - begin, to - begin] for at, to in inside]
        if inside and not re.search(r"\w", "".join(_left(line, within))):
            lines.append([begin, end])
        begin = end
    return _merged(spans + lines)


def _merged(spans: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


# The answer.


def _of_body(answer: bytes) -> str:
    (choice,) = json.loads(answer)["choices"]
    _refuse_unless_words(choice["message"])
    _refuse_unless_ended(choice)
    return _words(choice["message"].get("content") or "")


def _of_stream(answer: bytes) -> str:
    pieces: list[str] = []
    is_ended = is_whole = False
    for line in answer.decode().splitlines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            is_whole = True
            continue
        for choice in json.loads(data)["choices"]:
            _refuse_unless_words(choice["delta"])
            pieces.append(choice["delta"].get("content") or "")
            if choice.get("finish_reason") is not None:
                _refuse_unless_ended(choice)
                is_ended = True
    if not is_ended or not is_whole:
        raise NotPlain("the answer was cut off")
    return _words("".join(pieces))


def _refuse_unless_words(message: dict[str, Any]) -> None:
    for key in (
        "tool_calls",
        "function_call",
        "refusal",
        "audio",
        "reasoning",
        "reasoning_content",
    ):
        if message.get(key):
            raise NotPlain(f"the answer has {key!r}")


def _refuse_unless_ended(choice: dict[str, Any]) -> None:
    """A text that a stop word ended is not how the model ends its answers."""
    if choice["finish_reason"] != "stop" or isinstance(choice.get("stop_reason"), str):
        raise NotPlain("the answer did not come to its end by itself")


def _words(answer: str) -> str:
    if not answer.strip():
        raise NotPlain("the answer is empty")
    return answer
