"""A table of bad requests: each is refused with the key, value or remedy, and leaves no trace.

Our routes answer `{"error": {"type", "message", "param", "request_id"}}`; vLLM's own errors keep
OpenAI's shape. None shows a stack trace or a path of this machine, and none changes the cell.
"""

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request

from actors.errors import ReverieError, TooBusy, Unavailable
from serve_app import error_response
from tests.conftest import RunningCell

BODY_LIMIT = 8 * 1024**2
SAMPLE_LIMIT = 256
TAKEN = "bad-requests-taken"
"""The id of the one sample that is accepted, so that others can contradict it."""

JSON = {"content-type": "application/json"}
OUR_KEYS = {"type", "message", "param", "request_id"}
LEAK = re.compile(r'Traceback|File "|site-packages|(?<![\w.:/])/(home|root|tmp|usr|opt|var|proc)/')


@dataclass(frozen=True)
class Bad:
    """A request, and how it is refused. `{job}` in a path stands for a job that is done."""

    name: str
    method: str
    path: str
    body: Any
    """Bytes go as they are, everything else as JSON; None sends no body."""
    status: int
    says: str
    """Part of the message: the key, the value or the remedy."""
    param: str | None = None
    is_theirs: bool = False
    """Whether vLLM words the error."""
    content_type: str = "application/json"


def chat(*turns: tuple[str, Any], **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **keys}


GOOD = chat(("user", "What is a cat?"), ("assistant", "A small animal."))
TEXT = {"context": "What is a cat? ", "continuation": "A small animal."}
ONE_TOKEN_TOO_LONG = {"context_ids": [1], "continuation_ids": [5] * 2048}


def train(name: str, body: Any, status: int, says: str, param: str | None = None) -> Bad:
    return Bad(name, "POST", "/train", body, status, says, param)


def sample(name: str, bad: Any, says: str, key: str = "") -> Bad:
    """A job of one bad sample."""
    return train(name, {"samples": [bad]}, 422, says, f"samples[0]{key}")


def answer(name: str, content: Any, says: str, key: str = "") -> Bad:
    """A chat sample whose answer has this content."""
    return sample(name, chat(("user", "hi"), ("assistant", content)), says, key)


def ids(name: str, context: Any, continuation: Any, says: str, key: str = "") -> Bad:
    return sample(name, {"context_ids": context, "continuation_ids": continuation}, says, key)


def config(key: str, value: Any, says: str) -> Bad:
    body = {"samples": [GOOD], "config": {key: value}}
    return train(f"{key} {json.dumps(value)}", body, 422, says, f"config.{key}")


def needs(objective: str, says: str) -> Bad:
    """A job whose sample lacks what its objective needs."""
    body = {"samples": [GOOD], "config": {"objective": objective}}
    return train(f"{objective} of a plain sample", body, 422, says, "samples[0]")


def rollback(name: str, body: Any, status: int, says: str, param: str | None = None) -> Bad:
    return Bad(name, "POST", "/rollback", body, status, says, param)


def checkpoint(name: str, body: Any, status: int, says: str, param: str | None = None) -> Bad:
    return Bad(name, "POST", "/checkpoint", body, status, says, param)


def route(method: str, path: str, status: int, says: str, param: str | None = None) -> Bad:
    return Bad(f"{method} {path[:40]} is {status}", method, path, None, status, says, param)


def vllm(name: str, path: str, body: Any, status: int, says: str) -> Bad:
    return Bad(name, "POST", path, body, status, says, is_theirs=True)


def ask(name: str, status: int, says: str, **keys: Any) -> Bad:
    """A question to vLLM's chat route with some keys changed."""
    body = {"model": "{model}", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    return vllm(name, "/v1/chat/completions", body | keys, status, says)


MALFORMED = [
    train("not JSON", b"hello", 400, "line 1 column 1"),
    train("cut off", b'{"samples": [', 400, "not valid JSON"),
    train("empty body", b"", 400, "the body is empty; send a JSON object"),
    train("white space", b" \n ", 400, "the body is empty"),
    train("array", b"[]", 400, "must be a JSON object, not an array"),
    train("null", b"null", 400, "must be a JSON object, not null"),
    train("a string", b'"samples"', 400, 'not "samples"'),
    train("NaN", b'{"samples": [], "config": {"learning_rate": NaN}}', 400, "NaN is not a number"),
    train("Infinity", b'{"samples": [], "weight": -Infinity}', 400, "-Infinity is not a number"),
    train("deep array", b"[" * 100_000, 400, "nested too deeply"),
    train("deep object", b'{"a":' * 5_000 + b"1" + b"}" * 5_000, 400, "nested too deeply"),
    train("invalid UTF-8", b'{"samples": "\xff\xfe"}', 400, "not UTF-8"),
    train("UTF-16", '{"samples": []}'.encode("utf-16"), 400, "not UTF-8"),
    train("lone surrogate", b'{"samples": [{"context": "\\ud800"}]}', 400, "hex escape"),
    train("control character", b'{"samples": "\x00"}', 400, "control character"),
    train("endless number", b'{"samples": ' + b"9" * 5_000 + b"}", 400, "too many digits"),
    train("key twice", b'{"samples": [], "samples": []}', 400, '"samples" is given twice'),
    train("over the size", b" " * (BODY_LIMIT + 1), 413, f"limit of {BODY_LIMIT} bytes"),
    Bad(
        name="a form",
        method="POST",
        path="/train",
        body=b"samples=1",
        status=400,
        says="send the header 'Content-Type: application/json'",
        content_type="application/x-www-form-urlencoded",
    ),
    Bad(
        name="plain text, as another origin's page may post",
        method="POST",
        path="/train",
        body=json.dumps({"samples": [GOOD]}).encode(),
        status=400,
        says='the content type is "text/plain"',
        content_type="text/plain",
    ),
]

REQUESTS = [
    train("no samples", {}, 422, "is required", "samples"),
    train("empty samples", {"samples": []}, 422, "at least 1 item", "samples"),
    train("samples an object", {"samples": {}}, 422, "must be a valid array", "samples"),
    train("unknown key", {"samples": [GOOD], "sampels": 1}, 422, "unknown key", "sampels"),
    train(
        "too many samples",
        {"samples": [GOOD] * (SAMPLE_LIMIT + 1)},
        422,
        f"{SAMPLE_LIMIT + 1} at once, the limit is {SAMPLE_LIMIT}",
        "samples",
    ),
    train(
        "a bad sample beside a good one",
        {"samples": [GOOD, TEXT | {"continuation": ""}]},
        422,
        "samples[1]: the continuation is empty",
        "samples[1]",
    ),
    train(
        "a misspelt sample beside a good one",
        {"samples": [GOOD, {"contxt": "a", "continuation": "b"}]},
        422,
        "samples[1].contxt: unknown key",
        "samples[1].contxt",
    ),
    train(
        "an id that has other content",
        {"samples": [GOOD | {"id": TAKEN, "weight": 2}]},
        409,
        f"{TAKEN!r} was used before with other content",
        "samples",
    ),
    train(
        "one id for two contents",
        {"samples": [GOOD | {"id": "bad-twice"}, TEXT | {"id": "bad-twice"}]},
        409,
        "'bad-twice' was used before with other content",
        "samples",
    ),
    train(
        "a good sample beside an id that has other content",
        {"samples": [GOOD | {"id": "bad-beside"}, TEXT | {"id": TAKEN}]},
        409,
        "nothing of this request was queued",
        "samples",
    ),
]

SAMPLES = [
    sample("sample a string", "hello", 'must be an object, got "hello"'),
    sample("sample null", None, "must be an object, got null"),
    sample("sample empty", {}, "a sample is messages", ".messages"),
    sample("unknown key in sample", GOOD | {"wieght": 1}, "unknown key", ".wieght"),
    sample("messages and text", GOOD | TEXT, "belongs to another kind", ".messages"),
    sample(
        "messages and tokens",
        GOOD | {"context_ids": [1], "continuation_ids": [2]},
        "belongs to another kind",
        ".messages",
    ),
    sample(
        "text and tokens",
        {"context": "a", "continuation_ids": [1]},
        "context_ids and continuation_ids",
        ".context",
    ),
    sample("strip beside text", TEXT | {"strip": ["system"]}, "another kind", ".strip"),
    sample("context alone", {"context": "a"}, "is required", ".continuation"),
    sample("continuation alone", {"continuation": "a"}, "is required", ".context"),
    sample("no messages", chat(), "at least 1 item", ".messages"),
    sample("messages null", {"messages": None}, "must be a valid array", ".messages"),
    sample("no assistant message", chat(("user", "hi")), "there is no assistant message"),
    sample(
        "last message the user's",
        chat(("assistant", "hi"), ("user", "hi")),
        "the last message has role 'user'",
    ),
    sample("unknown role", chat(("robot", "hi")), 'got "robot"', ".messages[0].role"),
    sample(
        "unknown key in message",
        {"messages": [{"role": "assistant", "content": "hi", "name": "bob"}]},
        "unknown key",
        ".messages[0].name",
    ),
    sample(
        "message without content",
        {"messages": [{"role": "assistant"}]},
        "is required",
        ".messages[0].content",
    ),
    answer("empty answer", "", "the assistant message is empty"),
    answer("white-space answer", " \n\t", "the assistant message is empty"),
    answer("content null", None, "must be a valid string, got null", ".messages[1].content"),
    answer("content a number", 7, "must be a valid string, got 7", ".messages[1].content"),
    answer("content parts", [{"type": "text"}], "must be a valid string", ".messages[1].content"),
    sample("empty continuation", TEXT | {"continuation": ""}, "the continuation is empty"),
    sample("long continuation", TEXT | {"continuation": "word " * 3_000}, "of the model's 2048"),
    sample("one token too long", ONE_TOKEN_TOO_LONG, "needs 2049 places"),
    ids("id above the vocabulary", [1], [49_152], "continuation_ids[0]=49152 is not a token"),
    ids("id far above", [1, 10**30], [2], "context_ids[1]=1000000000000000000000000000000"),
    ids("id negative", [1], [2, -1], "got -1", ".continuation_ids[1]"),
    ids("id a fraction", [1], [1.5], "must be a valid integer, got 1.5", ".continuation_ids[0]"),
    ids("id a string", ["1"], [1], 'must be a valid integer, got "1"', ".context_ids[0]"),
    ids("id a boolean", [1], [True], "must be a valid integer, got true", ".continuation_ids[0]"),
    ids("ids a number", 1, [1], "must be a valid array", ".context_ids"),
    ids("empty ids", [1], [], "the continuation is empty"),
    ids("one token without context", [], [5], "predicts nothing; give a context"),
    sample("weight 0", GOOD | {"weight": 0}, "greater than 0", ".weight"),
    sample("weight -1", GOOD | {"weight": -1}, "greater than 0, got -1", ".weight"),
    sample("weight 101", GOOD | {"weight": 101}, "less than or equal to 100", ".weight"),
    sample("id empty", GOOD | {"id": ""}, "at least 1 character", ".id"),
    sample("id too long", GOOD | {"id": "x" * 129}, "at most 128 characters", ".id"),
    sample("id a number", GOOD | {"id": 7}, "must be a valid string, got 7", ".id"),
    sample("source too long", GOOD | {"source": "x" * 513}, "at most 512", ".source"),
    sample("strip unknown role", GOOD | {"strip": ["robot"]}, 'got "robot"', ".strip[0]"),
    sample("rejected without preference", GOOD | {"rejected": "No."}, "'preference' only"),
    sample("rejected empty", GOOD | {"rejected": ""}, "at least 1 character", ".rejected"),
    sample(
        "strip beyond the text",
        {"messages": [GOOD["messages"][0] | {"strip": [[0, 99]]}, GOOD["messages"][1]]},
        "has the span (0, 99)",
    ),
    sample("strip a string", GOOD | {"strip": "system"}, "must be a valid array", ".strip"),
]

CONFIGS = [
    config("learning_rate", 0, "greater than 0, got 0"),
    config("learning_rate", -1e-5, "greater than 0"),
    config("learning_rate", 0.1, "less than or equal to 0.01, got 0.1"),
    config("learning_rate", "1e-5", 'must be a valid number, got "1e-5"'),
    config("learning_rate", None, "must be a valid number, got null"),
    config("epochs", 0, "greater than or equal to 1, got 0"),
    config("epochs", 1001, "less than or equal to 1000"),
    config("epochs", 1.5, "must be a valid integer, got 1.5"),
    config("epochs", True, "must be a valid integer, got true"),
    config("warmup_steps", -1, "greater than or equal to 0"),
    config("objective", "dpo", "must be 'sft', 'distill' or 'preference', got \"dpo\""),
    needs("distill", "only the teacher reads"),
    needs("preference", "needs a rejected continuation"),
    config("grad_context", -1, "greater than or equal to 0, got -1"),
    config("anchor", -0.5, "greater than or equal to 0, got -0.5"),
    config("grad_ctx", 64, "unknown key"),
    config("lr", 1e-5, "unknown key"),
    config("duty", 0, "greater than or equal to 0.01"),
    config("duty", 1.5, "less than or equal to 1, got 1.5"),
    train("config an array", {"samples": [GOOD], "config": []}, 422, "an object", "config"),
    train("config null", {"samples": [GOOD], "config": None}, 422, "got null", "config"),
]

ROUTES = [
    rollback("no generation", {}, 422, "generation", "generation"),
    rollback("generation -1", {"generation": -1}, 422, "greater than or equal", "generation"),
    rollback("generation unknown", {"generation": 999}, 404, "is not kept", "generation"),
    rollback("generation 1.5", {"generation": 1.5}, 422, "generation", "generation"),
    rollback("generation huge", {"generation": 2**70}, 404, "is not kept", "generation"),
    route("GET", "/checkpoints/999", 404, "999 is not kept; nearest: ", "generation"),
    route("GET", "/checkpoints/nine", 404, "is a number; see GET /checkpoints", "generation"),
    route("GET", "/checkpoints/" + "9" * 4000, 404, "generation is a number", "generation"),
    route("GET", "/checkpoints/" + "9" * 5000, 400, "path and query are 5013 bytes, the limit is"),
    checkpoint("publish a word", {"publish": "yes"}, 422, 'got "yes"', "publish"),
    checkpoint("publish misspelt", {"publich": True}, 422, "unknown key", "publich"),
    checkpoint("checkpoint array", b"[true]", 400, "not an array"),
    checkpoint("checkpoint without a body", b"", 400, "the body is empty"),
    route("GET", "/train/jobs/job-none", 404, "there is no job 'job-none'; GET /train/jobs"),
    route("DELETE", "/train/jobs/job-none", 404, "there is no job 'job-none'"),
    route("GET", "/train/jobs/job-none/events", 404, "there is no job 'job-none'"),
    route("GET", "/train/jobs/%2e%2e%2fstatus", 404, "see /docs"),
    route("DELETE", "/train/jobs/{job}", 409, "is done already"),
    route("GET", "/nothing", 404, "there is no /nothing here; see /docs"),
    route("POST", "/sleep", 404, "there is no /sleep here"),
    route("GET", "/train", 405, "/train takes POST, not GET"),
    route("PUT", "/train/jobs/{job}", 405, "takes DELETE, GET, not PUT"),
    route("POST", "/train/jobs", 405, "takes GET, not POST"),
    route("POST", "/status", 405, "takes GET, not POST"),
    route("OPTIONS", "/train", 405, "takes POST, not OPTIONS"),
    route("DELETE", "/v1/models", 405, "takes GET, POST, not DELETE"),
    route("GET", "/v1/chat/completions", 405, "takes POST, not GET"),
    route("GET", "/tokenize", 405, "takes POST, not GET"),
    route("GET", "/v1/", 404, "see /docs"),
    route("GET", "/v1/nothing", 404, "there is no /v1/nothing here"),
    route("GET", "/v1//models", 404, "there is no /v1//models here"),
    route("GET", "/v1/%2e%2e/metrics", 404, "there is no /v1/../metrics here"),
    route("GET", "/v1/..%2fmetrics", 404, "see /docs"),
    route("GET", "/v1/%252e%252e/metrics", 404, "there is no /v1/%2e%2e/metrics here"),
    route("GET", "/v1/models%3Fx", 404, "see /docs"),
    route("POST", "/v1/load_lora_adapter", 404, "there is no /v1/load_lora_adapter here"),
    Bad("question over the size", "POST", "/v1/completions", b" " * (BODY_LIMIT + 1), 413, "limit"),
]

QUESTIONS = [
    ask("unknown model", 404, "`gpt` does not exist", model="gpt"),
    ask("unknown model, streamed", 404, "`gpt` does not exist", model="gpt", stream=True),
    ask("empty messages", 400, "at least one message", messages=[]),
    ask("negative max_tokens", 400, "max_tokens must be at least 1, got -1", max_tokens=-1),
    ask("max_tokens over the length", 400, "max_model_len=2048", max_tokens=100_000),
    ask("temperature 5", 400, "temperature must be in [0, 2], got 5", temperature=5),
    ask("temperature -1", 400, "temperature must be", temperature=-1),
    ask("long prompt", 400, "2048", messages=[{"role": "user", "content": "word " * 5_000}]),
    vllm("question not JSON", "/v1/chat/completions", b"hello", 400, "JSON decode error"),
    vllm("question without messages", "/v1/chat/completions", {}, 400, "body.messages"),
    vllm("tokenize nothing", "/tokenize", {}, 400, "body.prompt"),
    vllm("detokenize words", "/detokenize", {"tokens": ["x"]}, 400, "valid integer"),
]

CASES = [*MALFORMED, *REQUESTS, *SAMPLES, *CONFIGS, *ROUTES, *QUESTIONS]

pytestmark = pytest.mark.cell


@dataclass(frozen=True)
class Trace:
    """What a refused request must not change."""

    jobs: list[dict[str, Any]]
    weights_version: int
    boot: int


@dataclass(frozen=True)
class Before:
    """The cell before the table: idle, with one job that is done."""

    job: str
    model: str
    trace: Trace


def trace_of(cell: RunningCell) -> Trace:
    status = cell.get("/status")
    return Trace(
        jobs=cell.get("/train/jobs")["data"],
        weights_version=status["weights_version"],
        boot=status["boot"],
    )


@pytest.fixture(scope="module")
def before(cell: RunningCell) -> Before:
    body = {"samples": [GOOD | {"id": TAKEN}], "config": {"learning_rate": 1e-9}}
    job = cell.train(body)
    for known in cell.get("/train/jobs")["data"]:
        cell.wait_job(known["job_id"])
    return Before(job["job_id"], cell.get("/v1/models")["data"][0]["id"], trace_of(cell))


@pytest.fixture(scope="module")
def client(cell: RunningCell) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cell.base, timeout=120) as client:
        yield client


def check_error(answer: httpx.Response, bad: Bad, cell: RunningCell) -> None:
    """The status, the shape and the words of a refusal, and that it gives nothing away."""
    assert answer.status_code == bad.status, answer.text
    assert not LEAK.search(answer.text), answer.text
    assert str(cell.home) not in answer.text
    body = answer.json()
    assert set(body) == {"error"}, answer.text
    error = body["error"]
    assert bad.says in error["message"], answer.text
    if bad.is_theirs:
        assert {"message", "type"} <= set(error)
        return
    assert set(error) == OUR_KEYS
    assert error["type"].endswith("_error")
    assert error["param"] == bad.param
    assert error["request_id"] == answer.headers["x-request-id"] != ""
    assert ("allow" in answer.headers) == (bad.status == 405)


def test_the_table_is_long_and_names_each_case_once() -> None:
    assert len(CASES) >= 55
    assert len({bad.name for bad in CASES}) == len(CASES)


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_bad_request_is_refused_with_its_reason(
    bad: Bad, cell: RunningCell, client: httpx.Client, before: Before
) -> None:
    content = bad.body
    if content is not None and not isinstance(content, bytes):
        content = json.dumps(content).replace("{model}", before.model).encode()
    headers = {} if content is None else {"content-type": bad.content_type}
    path = bad.path.replace("{job}", before.job)
    answer = client.request(bad.method, path, content=content, headers=headers)
    check_error(answer, bad, cell)


def test_a_chunked_body_is_refused_when_it_passes_the_limit(
    cell: RunningCell, client: httpx.Client, before: Before
) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(2 * BODY_LIMIT // 65_536):
            yield b" " * 65_536

    answer = client.post("/train", content=endless(), headers=JSON)
    assert "content-length" not in answer.request.headers
    check_error(answer, train("chunked", b"", 413, f"limit of {BODY_LIMIT} bytes"), cell)


HEAD = b"HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
RAW = {
    "no HTTP": (b"HELLO\r\n\r\n", 400),
    "negative length": (b"POST /train HTTP/1.1\r\nContent-Length: -5\r\n\r\n{}", 400),
    "a length that never comes": (
        b"POST /train HTTP/1.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999999\r\n\r\n{}",
        413,
    ),
    "two lengths, as smugglers send": (
        b"POST /train HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "a chunk without a size": (
        b"POST /train HTTP/1.1\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        400,
    ),
    "zero in a header": (b"GET /status HTTP/1.1\r\nX-A: a\0b\r\n\r\n", 400),
    "a path of a megabyte": (b"GET /v1/" + b"y" * 1_000_000 + b" HTTP/1.1\r\n\r\n", 400),
    "a path that climbs to a page": (b"GET /v1/../status HTTP/1.1\r\n\r\n", 404),
    "a path that climbs to a route": (
        b"POST /v1/../train HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        404,
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_what_no_client_sends_is_refused_too(name: str, cell: RunningCell, before: Before) -> None:
    text, status = RAW[name]
    address = urlsplit(cell.base)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 80), timeout=30) as sent:
        sent.sendall(text.replace(b"HTTP/1.1\r\n", HEAD))
        received = b""
        while part := sent.recv(65_536):
            received += part
    assert received.startswith(b"HTTP/1.1 %d " % status), received[:500]
    assert not LEAK.search(received.decode()), received[:500]


def test_a_header_of_two_megabytes_breaks_nothing(client: httpx.Client, before: Before) -> None:
    answer = client.get("/nothing", headers={"x-big": "y" * 2_000_000})
    assert answer.status_code < 500


@pytest.mark.parametrize("error", [TooBusy("128 requests"), Unavailable("the cell is starting")])
def test_an_error_that_passes_says_when_to_try_again(error: ReverieError) -> None:
    headers = [(b"x-request-id", b"req-1")]
    request = Request({"type": "http", "method": "GET", "path": "/", "headers": headers})
    answer = error_response(error, request)
    assert answer.status_code in (429, 503)
    assert int(answer.headers["retry-after"]) > 0
    body = json.loads(bytes(answer.body))
    assert set(body["error"]) == OUR_KEYS
    assert body["error"]["request_id"] == "req-1"


def test_the_whole_table_changed_nothing(cell: RunningCell, before: Before) -> None:
    assert trace_of(cell) == before.trace
    assert cell.is_ready()
