"""Requests generated from the OpenAPI document, and what no answer may be.

    schemathesis: cases of each route, right and wrong --> known ids, keys --> send --> faults_of

Used by tests/test_fuzz.py with some hundred cases, and by experiments/door_fuzz.py with 10,000.
"""

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from schemathesis import GenerationMode

from tests.open_door import BASE, OpenDoor, client, opened, train_body

CASE_TIMEOUT_S = 30.0
"""A request that takes longer hangs."""
REQUEST_TIMEOUT_S = 0.2
"""`limits.request_timeout_s`: a job's events, which nothing ends here, are a stream this long."""
MAX_EACH = 50
"""Cases of a route and a kind in one turn; a route that takes nothing has but one."""
MAX_TURNS = 50
TRACES = ("Traceback", 'File "', "site-packages", ".py:", "0x7f")
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
BRIEF = {"instruction": "Be brief.", "checks": {"max_words": 5}}

Send = Callable[[httpx.Request], httpx.Response]


@dataclass
class Tally:
    """What was sent and what came back."""

    sent: int = 0
    unsendable: int = 0
    """No client can say them: a line end in a header."""
    statuses: Counter[int] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    """Answers below 300, by route."""
    faults: list[str] = field(default_factory=list)


def faults_of(answer: httpx.Response, secrets: Sequence[str]) -> list[str]:
    """What is wrong with an answer, whatever was asked."""
    found, status = [], answer.status_code
    if status >= 500 and status != 503:
        found.append(f"status {status}")
    if any(name.startswith("access-control-") for name in answer.headers):
        found.append("an Access-Control header")
    if answer.headers.get("cache-control") != "no-store":
        found.append("no Cache-Control: no-store")
    text = answer.text
    if status >= 400:
        found += _faults_of_error(answer)
        found += [f"leaks {each!r}" for each in (*TRACES, *secrets) if each in text]
    return found


def _faults_of_error(answer: httpx.Response) -> list[str]:
    if answer.request.url.path.startswith("/v1") or answer.request.method == "HEAD":
        return []
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return ["an error that is not worded as all are"]
    is_whole = isinstance(error, dict) and {"type", "message", "param", "request_id"} <= set(error)
    return [] if is_whole else ["an error without its four parts"]


def run(
    document: dict[str, Any],
    send: Send,
    num_cases: int,
    *,
    keys: Sequence[str | None] = (None,),
    known: Sequence[str] = (),
    secrets: Sequence[str] = (),
    start: int = 0,
    tell: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Send about so many cases, evenly over routes and over right and wrong ones.

    `tell` is called after those of each route and kind. Half of all path parameters are one of the
    `known` ids; a key of `keys` is drawn for each.
    """
    decorate: Any = given  # Of a strategy that is only known when this runs.
    schema: Any = schemathesis.openapi.from_dict(document)
    operations = [each.ok() for each in schema.get_all_operations()]
    each_of = min(MAX_EACH, -(-num_cases // (len(operations) * len(MODES))))
    tally, rng = Tally(), random.Random(start)

    def one(case: Any) -> None:
        for name in case.path_parameters or {}:
            if known and rng.random() < 0.5:
                case.path_parameters[name] = rng.choice(known)
        _send_one(case, send, rng.choice(keys), tally, secrets)

    strategies = [(each, mode) for each in operations for mode in MODES]
    for turn in range(MAX_TURNS):
        for at, (operation, mode) in enumerate(strategies):
            if tally.sent >= num_cases:
                return tally
            cases = operation.as_strategy(generation_mode=mode)
            chosen = settings(
                max_examples=each_of,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                verbosity=Verbosity.quiet,
                suppress_health_check=list(HealthCheck),
            )
            try:
                test: Any = decorate(cases)(one)
                test = seed(f"{start} {turn} {at}")(chosen(test))
                test()
            except Exception as error:
                if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
                    raise  # A route that takes nothing has no wrong cases.
            tell(tally)
    return tally


def _send_one(case: Any, send: Send, key: str | None, tally: Tally, secrets: Sequence[str]) -> None:
    try:
        request = _request_of(case, key)
    except (ValueError, TypeError, httpx.InvalidURL):
        tally.unsendable += 1
        return
    where = f"{case.operation.method.upper()} {case.operation.path}"
    tally.sent += 1
    try:
        answer = send(request)
    except (TimeoutError, httpx.TimeoutException):
        tally.faults.append(f"{where}: no answer within {CASE_TIMEOUT_S:g} s")
        return
    except (httpx.LocalProtocolError, UnicodeError):
        tally.sent -= 1
        tally.unsendable += 1
        return
    tally.statuses[answer.status_code] += 1
    if answer.status_code < 300:
        tally.reached[where] += 1
    for fault in faults_of(answer, secrets):
        asked = (request.content or b"")[:300]
        tally.faults.append(f"{where}: {fault}; {request.url} {asked!r}: {answer.text[:200]}")


def _request_of(case: Any, key: str | None) -> httpx.Request:
    told = case.as_transport_kwargs(base_url=BASE)
    headers = [(str(name), value) for name, value in (told.get("headers") or {}).items()]
    if key is not None:
        headers = [pair for pair in headers if pair[0].lower() != "authorization"]
        headers.append(("authorization", f"Bearer {key}"))
    body = told.get("data")
    if "json" in told:
        body = json.dumps(told["json"]).encode()
        if not any(name.lower() == "content-type" for name, _ in headers):
            headers.append(("content-type", "application/json"))
    if isinstance(body, str):
        body = body.encode("utf-8", "surrogatepass")
    if body is not None and not isinstance(body, bytes):
        raise TypeError(f"a body of {type(body).__name__}")
    return httpx.Request(
        told["method"], told["url"], params=told.get("params"), headers=headers, content=body
    )


@contextmanager
def in_process(home: Path) -> Iterator[tuple[OpenDoor, Send]]:
    """A door on a loop of its own, in a thread; requests are sent to it one after another."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    stack = AsyncExitStack()

    def wait(what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, loop).result(CASE_TIMEOUT_S)

    async def enter() -> tuple[OpenDoor, httpx.AsyncClient]:
        made = opened(home, request_timeout_s=REQUEST_TIMEOUT_S)
        return await stack.enter_async_context(made), await stack.enter_async_context(client())

    door, http = wait(enter())

    def send(request: httpx.Request) -> httpx.Response:
        return wait(http.send(request))  # type: ignore[no-any-return]

    try:
        yield door, send
    finally:
        wait(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def furnish(door: OpenDoor, send: Send) -> list[str]:
    """Something of everything, for routes to find; returns the ids."""
    job = _post(send, "/train", train_body(id="sample-1")).json()["job_id"]
    _post(send, "/behaviours/brief", BRIEF, "PUT")
    _post(send, "/memories", {"memories": [{"id": "memory-1", "text": "I own a hat."}]})
    store = door.dreamer._store
    made = store.begin_round("brief", 0.7)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "Hello."}}]}
    exchange = serve_exchange({"messages": turns}, answer)
    assert asyncio.run(door.dreamer.hear((exchange,))) == 1, "it was passed over"
    logged = store.next_unscored()
    assert logged is not None
    candidate = store.propose(logged.number, "Hello there.", (-1.0, -2.0), 0)
    assert candidate is not None
    return [job, "brief", "memory-1", made.id, candidate.id, candidate.conversation, "1", "0"]


def serve_exchange(asked: dict[str, Any], answered: dict[str, Any]) -> Any:
    """A chat as the door hands it on."""
    from actors.dream.exchange import Exchange

    return Exchange(
        json.dumps(asked).encode(), json.dumps(answered).encode(), False, 0, 0, True, 0.0
    )


def _post(send: Send, route: str, body: Any, method: str = "POST") -> httpx.Response:
    answer = send(httpx.Request(method, BASE + route, json=body))
    assert answer.status_code < 300, answer.text
    return answer
