"""The live model as the dream loop asks it: answers, and log-probabilities of given answers.

    round, gate --messages--> EngineModel --HTTP on the private socket--> vLLM

Knows HTTP and token ids; what is asked, and why, is others' business. Whoever cancels a call closes
its connection, and vLLM ends what it was computing.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, Protocol

import httpx

from actors.errors import InvalidRequest, Unavailable

Message = dict[str, str]
"""`role` and `content`."""

MAX_ONGOING: Final = 16
"""Most requests at once: half of the engine's default batch, so that a client finds room."""
TIMEOUT_S: Final = 300.0
FLOOR: Final = -100.0
"""Stands for the log-probability of what the model holds to be impossible."""


@dataclass(frozen=True)
class Answer:
    """One answer, as the model gave it."""

    text: str
    """Without special tokens, stripped."""
    token_ids: tuple[int, ...]
    is_finished: bool
    """Whether it ended by itself."""
    mean_logprob: float
    """Of its tokens, in nats, before any temperature."""


class LiveModel(Protocol):
    """What dreams need of a model. Each call raises Unavailable, or InvalidRequest if refused."""

    @property
    def num_tokens(self) -> int:
        """Tokens read and written so far."""
        ...

    async def answer(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 96,
        seed: int | None = None,
    ) -> list[Answer]:
        """`n` answers to a chat."""
        ...

    async def complete(
        self,
        prompt: str,
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 96,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """`n` continuations of a text, each ended before the first of `stop`."""
        ...

    async def logprobs(
        self, messages: Sequence[Message], answer: str | Sequence[int]
    ) -> tuple[float, ...]:
        """Of each token of `answer` after `messages`, in nats.

        A text includes the end of its turn; token ids are taken as they are.
        """
        ...

    async def prefer(self, prompt: str, options: Sequence[str]) -> tuple[float, ...]:
        """Log-probability of each option, in nats, as the continuation of a text."""
        ...


async def divergence(
    model: LiveModel, instruction: Sequence[Message], messages: Sequence[Message], answer: str
) -> tuple[float, float]:
    """Mean log-probability per token of `answer` with the instruction in view, and without."""
    shown, hidden = await asyncio.gather(
        model.logprobs([*instruction, *messages], answer), model.logprobs(messages, answer)
    )
    return fmean(shown), fmean(hidden)


def engine_client(socket: str) -> httpx.AsyncClient:
    """A client of the engine's own socket; who made it closes it, or the model that it is given."""
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=socket, retries=1),
        base_url="http://engine",
        timeout=TIMEOUT_S,
    )


class EngineModel:
    """The served model, through vLLM's own routes."""

    def __init__(self, client: httpx.AsyncClient, name: str) -> None:
        self._client = client
        self._name = name
        self._slots = asyncio.Semaphore(MAX_ONGOING)
        self._ends: tuple[int, ...] | None = None
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    async def close(self) -> None:
        await self._client.aclose()

    async def answer(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 96,
        seed: int | None = None,
    ) -> list[Answer]:
        asked = {"messages": list(messages), "logprobs": True, "max_completion_tokens": max_tokens}
        reply = await self._generate("/v1/chat/completions", asked, n, temperature, seed)
        return [_answer(choice, choice["message"]["content"]) for choice in reply["choices"]]

    async def complete(
        self,
        prompt: str,
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 96,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        asked = {"prompt": prompt, "logprobs": 0, "max_tokens": max_tokens, "stop": list(stop)}
        reply = await self._generate("/v1/completions", asked, n, temperature, seed)
        return [_answer(choice, choice["text"]) for choice in reply["choices"]]

    async def logprobs(
        self, messages: Sequence[Message], answer: str | Sequence[int]
    ) -> tuple[float, ...]:
        context = await self._tokenize(messages, has_answer=False)
        if isinstance(answer, str):
            answer = await self._answer_ids(messages, context, answer)
        return await self._read(context, answer)

    async def prefer(self, prompt: str, options: Sequence[str]) -> tuple[float, ...]:
        context = await self._tokenize_text(prompt)
        read = [self._prefer_one(prompt, context, option) for option in options]
        return tuple(await asyncio.gather(*read))

    async def _prefer_one(self, prompt: str, context: list[int], option: str) -> float:
        whole = await self._tokenize_text(prompt + option)
        if whole[: len(context)] != context:
            raise InvalidRequest(f"the option {option!r} is one token with the end of its prompt")
        return sum(await self._read(context, whole[len(context) :]))

    async def _read(self, context: Sequence[int], learned: Sequence[int]) -> tuple[float, ...]:
        """Log-probabilities of the learned tokens after the context."""
        asked = {
            "prompt": [*context, *learned],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        reply = await self._post("/v1/completions", asked)
        rows = reply["choices"][0]["prompt_logprobs"][-len(learned) :]
        return tuple(
            max(FLOOR, row[str(token)]["logprob"]) for row, token in zip(rows, learned, strict=True)
        )

    async def _answer_ids(
        self, messages: Sequence[Message], context: list[int], answer: str
    ) -> list[int]:
        """Tokens of an answer up to the one that ends the turn, as the chat template has them."""
        if self._ends is None:
            empty = [*messages, {"role": "assistant", "content": ""}]
            self._ends = tuple((await self._tokenize(empty, has_answer=True))[len(context) :])
        given = [*messages, {"role": "assistant", "content": answer}]
        whole = await self._tokenize(given, has_answer=True)
        num_ends = len(self._ends)
        is_plain = whole[: len(context)] == context and num_ends > 0
        if not is_plain or tuple(whole[-num_ends:]) != self._ends:
            raise InvalidRequest("the chat template does not put the answer after its context")
        return [*whole[len(context) : -num_ends], self._ends[0]]

    async def _tokenize_text(self, text: str) -> list[int]:
        tokens: list[int] = (await self._post("/tokenize", {"prompt": text}))["tokens"]
        return tokens

    async def _tokenize(self, messages: Sequence[Message], *, has_answer: bool) -> list[int]:
        asked = {"messages": list(messages), "add_generation_prompt": not has_answer}
        tokens: list[int] = (await self._post("/tokenize", asked))["tokens"]
        return tokens

    async def _generate(
        self, route: str, asked: dict[str, Any], n: int, temperature: float, seed: int | None
    ) -> Any:
        # Whatever the model's own defaults are: what is drawn comes from its whole distribution.
        whole = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        sampling = {"n": n, "temperature": temperature, "return_token_ids": True, **whole}
        if seed is not None:
            sampling["seed"] = seed
        return await self._post(route, asked | sampling)

    async def _post(self, route: str, asked: dict[str, Any]) -> Any:
        async with self._slots:
            try:
                reply = await self._client.post(route, json=asked | {"model": self._name})
            except httpx.HTTPError as error:
                raise Unavailable(f"the model did not answer: {type(error).__name__}") from None
        if reply.status_code in (400, 422):
            raise InvalidRequest(f"vLLM refused it: {_reason(reply)}")
        if reply.status_code != 200:
            raise Unavailable(f"the model answered {reply.status_code}")
        answer = reply.json()
        self._num_tokens += answer.get("usage", {}).get("total_tokens", 0)
        return answer


def _answer(choice: dict[str, Any], text: str | None) -> Answer:
    logprobs = choice["logprobs"]
    if "content" in logprobs:  # The chat's shape.
        values = [token["logprob"] for token in logprobs["content"]]
    else:
        values = logprobs["token_logprobs"]
    return Answer(
        text=(text or "").strip(),
        token_ids=tuple(choice["token_ids"]),
        is_finished=choice["finish_reason"] == "stop",
        mean_logprob=fmean(max(FLOOR, value) for value in values) if values else FLOOR,
    )


def _reason(reply: httpx.Response) -> str:
    """vLLM's own words, without what was asked: they may quote it, so only their beginning."""
    try:
        return str(reply.json()["error"]["message"]).splitlines()[0][:200]
    except (ValueError, KeyError, TypeError, IndexError):
        return f"status {reply.status_code}"
