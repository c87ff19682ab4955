"""The official `openai` client against the door: errors it knows, streams, tools, structure.

Errors are those of the real application in this process; what the model answers, of a real cell.
"""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from actors.errors import TooBusy
from tests import open_door
from tests.conftest import RunningCell

HELLO: Final[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: Final[Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
ASKED: Final[Any] = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
NAMED: Final[Any] = {"type": "function", "function": {"name": "get_weather"}}

# Errors.


@asynccontextmanager
async def in_process(home: Path, key: str = "none", **limits: Any) -> AsyncIterator[Any]:
    """A door, and the official client of it."""
    async with open_door.opened(home, **limits) as door, open_door.client() as http:
        given: Any = {"api_key": key, "max_retries": 0, "http_client": http}
        yield door, AsyncOpenAI(base_url=f"{open_door.BASE}/v1", **given)


async def ask(official: AsyncOpenAI) -> Any:
    return await official.chat.completions.create(model="made-up", messages=HELLO)


async def teach(official: AsyncOpenAI, body: Any) -> Any:
    url = f"{open_door.BASE}/train"
    return await official.post(url, cast_to=httpx.Response, body=body)


def says(caught: Any, word: str) -> None:
    """What a caller can act on: a type, a parameter, and words of ours."""
    error = caught.value
    assert word in error.message and error.body["message"] and error.type
    assert error.body["request_id"] is not None


async def test_an_unknown_route_is_not_found(tmp_path: Path) -> None:
    async with in_process(tmp_path) as (_, official):
        with pytest.raises(openai.NotFoundError) as caught:
            await official.get(f"{open_door.BASE}/nothing", cast_to=httpx.Response)
        says(caught, "/nothing")


async def test_a_wrong_sample_is_unprocessable_and_a_wrong_body_a_bad_request(
    tmp_path: Path,
) -> None:
    async with in_process(tmp_path) as (_, official):
        with pytest.raises(openai.UnprocessableEntityError) as wrong:
            await teach(official, {"samples": [{"context": "a"}]})
        says(wrong, "continuation")
        assert wrong.value.param == "samples[0].continuation"
        with pytest.raises(openai.BadRequestError) as malformed:
            await teach(official, [])
        says(malformed, "object")


async def test_a_key_that_is_wrong_or_may_not_is_said_so(tmp_path: Path) -> None:
    async with in_process(tmp_path) as (door, official):
        use = door._keys.add("use")
        with pytest.raises(openai.AuthenticationError) as unknown:
            await ask(official)
        says(unknown, "key")
        with pytest.raises(openai.PermissionDeniedError) as forbidden:
            await teach(official.with_options(api_key=use), open_door.train_body())
        says(forbidden, "teach")
        assert (await ask(official.with_options(api_key=use))).choices


async def test_a_full_house_is_a_rate_limit_and_the_client_s_own_retry_gets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TooBusy, "retry_after_s", 1)
    async with in_process(tmp_path, max_ongoing_requests=1) as (door, official):
        door._slots.take()
        with pytest.raises(openai.RateLimitError) as busy:
            await ask(official)
        says(busy, "1 requests")
        assert busy.value.response.headers["retry-after"] == "1"
        tries: list[int] = []

        async def leave_at_the_second(request: httpx.Request) -> None:
            tries.append(int(request.headers["x-stainless-retry-count"]))
            if len(tries) == 2:
                door._slots.give()

        official._client.event_hooks["request"].append(leave_at_the_second)
        assert (await ask(official.with_options(max_retries=2))).choices
        assert tries == [0, 1]


@pytest.mark.parametrize("state", ["starting", "recovering", "stopping"])
async def test_a_cell_that_is_not_ready_is_unavailable_and_the_client_tries_again(
    tmp_path: Path, state: Literal["starting", "recovering", "stopping"]
) -> None:
    async with in_process(tmp_path) as (door, official):
        door._report = replace(door._report, state=state, engine=None)
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(official)
        says(caught, state)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "5"
        assert official._should_retry(caught.value.response)


# Answers.


@pytest.fixture
def client(cell: RunningCell) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{cell.base}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.mark.cell
def test_a_stream_is_what_the_whole_answer_is_and_counts_its_tokens(
    client: OpenAI, model: str
) -> None:
    given: Any = {"model": model, "messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**given)
    pieces = list(
        client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    )
    *told, last = pieces
    text = "".join(piece.choices[0].delta.content or "" for piece in told)
    assert text == whole.choices[0].message.content
    assert told[0].choices[0].delta.role == "assistant"
    assert told[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage == whole.usage


@pytest.mark.cell
def test_the_client_s_stream_helper_gathers_the_answer(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=HELLO, temperature=0, max_tokens=12
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text and final.choices[0].message.content == text


@pytest.mark.cell
@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
def test_a_tool_is_called_with_arguments_of_its_schema(
    client: OpenAI, model: str, choice: Any
) -> None:
    given: Any = {"model": model, "messages": ASKED, "tools": [WEATHER], "tool_choice": choice}
    given |= {"temperature": 0, "max_tokens": 120}
    call: Any = (client.chat.completions.create(**given).choices[0].message.tool_calls or [])[0]
    assert call.type == "function" and call.function.name == "get_weather" and call.id
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"city", "unit"} and arguments["unit"] in ("celsius", "fahrenheit")

    name, written = "", ""
    for piece in client.chat.completions.create(**given, stream=True):
        for delta in piece.choices[0].delta.tool_calls or ():
            if delta.index == 0:  # Where a call is required the model may go on to a second one.
                name += delta.function.name or ""
                written += delta.function.arguments or ""
    assert (name, json.loads(written)) == ("get_weather", arguments)


@pytest.mark.cell
@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_a_model_that_is_left_the_choice_answers(
    client: OpenAI, model: str, is_stream: bool
) -> None:
    """The default model has not learned to call tools: it talks, and that is passed on."""
    given: Any = {"model": model, "messages": ASKED, "tools": [WEATHER], "tool_choice": "auto"}
    given |= {"temperature": 0, "max_tokens": 20}
    if is_stream:
        with client.chat.completions.stream(**given) as stream:
            message: Any = stream.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**given).choices[0].message
    assert message.content or message.tool_calls


class Ship(BaseModel):
    """What the model is made to write."""

    name: Literal["Argo", "Beagle", "Pequod"]
    masts: Literal[1, 2, 3]
    is_sunk: bool


@pytest.mark.cell
def test_an_answer_has_the_structure_that_was_asked_for(client: OpenAI, model: str) -> None:
    asked: Any = [{"role": "user", "content": "Describe the ship in Moby Dick as JSON."}]
    given: Any = {"model": model, "messages": asked, "max_tokens": 80, "temperature": 0}
    parsed = client.chat.completions.parse(**given, response_format=Ship)
    assert isinstance(parsed.choices[0].message.parsed, Ship)
    with client.chat.completions.stream(**given, response_format=Ship) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == parsed.choices[0].message.parsed


@pytest.mark.cell
@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (openai.NotFoundError, {"model": "gpt-none"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"max_tokens": 10**6}),
        (openai.BadRequestError, {"messages": "Hello"}),
        (openai.BadRequestError, {"response_format": {"type": "json_schema"}}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "word " * 5000}]}),
    ],
    ids=["model", "temperature", "max_tokens", "messages", "schema", "too-long"],
)
def test_what_vllm_refuses_the_client_knows(
    client: OpenAI, model: str, kind: type[openai.APIStatusError], changed: Any
) -> None:
    given: Any = {"model": model, "messages": HELLO, "max_tokens": 8}
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**(given | changed), stream=stream)
        assert caught.value.message and "Traceback" not in caught.value.message


# Leaving, and giving way.


def until(is_so: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.mark.cell
@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_frees_its_slot_and_vllm_stops_for_it(
    cell: RunningCell, model: str, is_stream: bool
) -> None:
    """1900 tokens take two minutes here: vLLM stops long before the last of them."""
    limit_s = 60 if is_stream else 4
    client = OpenAI(base_url=f"{cell.base}/v1", api_key="none", max_retries=0, timeout=limit_s)
    given: Any = {"model": model, "prompt": "Once", "max_tokens": 1900, "stream": is_stream}
    given["extra_body"] = {"ignore_eos": True}

    def running() -> float:
        lines = httpx.get(f"{cell.base}/metrics", timeout=30).text.splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
        )

    def inside() -> int:
        return int(cell.get("/status")["ingress"]["ongoing_requests"])

    with client:
        if is_stream:
            stream = client.completions.create(**given)
            next(iter(stream))
            until(lambda: running() >= 1 <= inside(), "it was never seen inside")
            stream.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**given)
        until(lambda: inside() == 0, "its slot is still taken", 30)
        until(lambda: running() == 0, "vLLM goes on for nobody", 30)


@pytest.mark.cell
def test_the_trainer_gives_way_while_answers_are_streamed_and_is_free_when_idle(
    cell: RunningCell, client: OpenAI, model: str
) -> None:
    def trainer() -> Any:
        return cell.get("/status")["trainer"]

    sample = {"context": "The tide", "continuation": " comes in twice a day, nearly."}
    body = {"samples": [sample], "config": {"epochs": 1000, "learning_rate": 1e-9}}
    job_id = httpx.post(f"{cell.base}/train", json=body, timeout=60).json()["job_id"]
    try:
        until(lambda: trainer()["steps"] >= 2, "it does not learn")
        alone = trainer()
        assert alone["duty"] == 1 and alone["last_rested_s"] == 0
        streams = [
            client.completions.create(
                model=model,
                prompt=f"Story {number}:",
                max_tokens=1900,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for number in range(4)
        ]
        until(lambda: trainer()["duty"] < 1, "it does not give way")
        until(lambda: trainer()["last_rested_s"] > 0, "no step has rested")
        for stream in streams:
            stream.close()
        until(lambda: trainer()["duty"] == 1, "it goes on giving way to nobody")
        steps = trainer()["steps"]
        until(lambda: trainer()["steps"] >= steps + 2, "it does not go on")
        assert trainer()["last_rested_s"] == 0
    finally:
        httpx.delete(f"{cell.base}/train/jobs/{job_id}", timeout=60)
        cell.wait_job(job_id)
