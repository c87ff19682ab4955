"""What is logged at the door: who decides, which answers are whole, and that nobody waits."""

import asyncio

import pytest
from starlette.requests import Request

from actors.dream.exchange import Exchange
from actors.errors import InvalidRequest, Unavailable
from door import exchanges
from door.exchanges import CHAT_PATH, ExchangeLog

BODY = b'{"messages": []}'


class Receiver:
    """The dream actor: keeps all but what it is told not to."""

    def __init__(self) -> None:
        self.batches: list[tuple[Exchange, ...]] = []
        self.kept = 0
        self.error: Exception | None = None
        self.may_go = asyncio.Event()
        self.may_go.set()

    async def __call__(self, batch: tuple[Exchange, ...]) -> int:
        await self.may_go.wait()
        if self.error is not None:
            raise self.error
        self.batches.append(batch)
        return self.kept or len(batch)


def request_of(given: str | None = None, path: str = CHAT_PATH, method: str = "POST") -> Request:
    headers = [] if given is None else [(b"x-reverie-log", given.encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    return Request(scope | {"query_string": b"", "server": ("127.0.0.1", 1), "scheme": "http"})


def hear(log: ExchangeLog, *parts: bytes, given: str | None = "on", body: bytes = BODY) -> None:
    hearing = log.hear(request_of(given), body, lambda request: True)
    assert hearing is not None
    for part in parts:
        hearing.take(part)
    hearing.end(True, 3, 4)


async def settled(log: ExchangeLog, num: int) -> None:
    for _ in range(200):
        if log.kept + log.passed_over + log.dropped >= num:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(vars(log))


@pytest.mark.parametrize(
    ("is_on", "given", "is_heard"),
    [
        (False, None, False),
        (False, "on", True),
        (False, "off", False),
        (True, None, True),
        (True, "on", True),
        (True, "off", False),
    ],
)
async def test_the_header_wins_over_the_setting(
    is_on: bool, given: str | None, is_heard: bool
) -> None:
    hearing = ExchangeLog(is_on, Receiver()).hear(request_of(given), BODY, lambda request: True)
    assert (hearing is not None) is is_heard


@pytest.mark.parametrize("given", ["", "ON", "yes", "true"])
async def test_another_word_is_refused_and_not_taken_for_a_yes_or_a_no(given: str) -> None:
    with pytest.raises(InvalidRequest, match="x-reverie-log: .*; send on or off"):
        ExchangeLog(True, Receiver()).hear(request_of(given), BODY, lambda request: True)


@pytest.mark.parametrize(
    ("path", "method"), [("/v1/completions", "POST"), ("/v1/models", "GET"), (CHAT_PATH, "GET")]
)
async def test_only_chats_are_logged(path: str, method: str) -> None:
    request = request_of("on", path, method)
    assert ExchangeLog(True, Receiver()).hear(request, BODY, lambda request: True) is None


async def test_keys_are_looked_up_only_for_what_is_logged() -> None:
    def looked_up(request: Request) -> bool:
        raise AssertionError("not logged")

    assert ExchangeLog(False, Receiver()).hear(request_of(), BODY, looked_up) is None


async def test_a_whole_answer_is_delivered_as_it_went_by() -> None:
    receiver = Receiver()
    log = ExchangeLog(False, receiver)
    hear(log, b"data: 1\n\n", b"data: [DONE]\n\n")
    await settled(log, 1)
    ((only,),) = receiver.batches
    assert (only.body, only.answer) == (BODY, b"data: 1\n\ndata: [DONE]\n\n")
    assert (only.first_version, only.last_version, only.may_teach) == (3, 4, True)
    assert (log.kept, log.passed_over, log.dropped) == (1, 0, 0)


async def test_an_answer_or_a_request_over_the_bound_is_dropped_and_counted() -> None:
    receiver = Receiver()
    log = ExchangeLog(False, receiver)
    hear(log, b"x" * exchanges.MAX_BYTES, b"y", b"z")
    hear(log, b"x", body=b"x" * (exchanges.MAX_BYTES + 1))
    hear(log, b"x" * exchanges.MAX_BYTES)
    await settled(log, 3)
    assert (log.kept, log.dropped) == (1, 2)


async def test_while_an_answer_passes_no_more_than_the_bound_is_held() -> None:
    hearing = ExchangeLog(True, Receiver()).hear(request_of(), BODY, lambda request: True)
    assert hearing is not None
    for _ in range(100):
        hearing.take(b"x" * 10_000)
        assert sum(map(len, hearing._parts)) <= exchanges.MAX_BYTES
    assert hearing._parts == []


async def test_what_comes_while_the_dream_actor_is_slow_waits_up_to_a_bound_and_nobody_waits() -> (
    None
):
    receiver = Receiver()
    log = ExchangeLog(False, receiver)
    receiver.may_go.clear()
    hear(log, b"first")
    await asyncio.sleep(0.01)  # It is with the dream actor.
    for at in range(exchanges.MAX_WAITING + 5):
        hear(log, str(at).encode())
    assert log.dropped == 5, "said at once: offering never waits"
    receiver.may_go.set()
    await settled(log, exchanges.MAX_WAITING + 6)
    assert log.kept == exchanges.MAX_WAITING + 1
    assert max(map(len, receiver.batches)) == exchanges.MAX_AT_ONCE


@pytest.mark.parametrize("error", [Unavailable("it restarts"), KeyError("a fault of ours")])
async def test_what_cannot_be_delivered_is_dropped_and_the_next_is_sent(error: Exception) -> None:
    receiver = Receiver()
    log = ExchangeLog(False, receiver)
    receiver.error = error
    hear(log, b"1")
    await settled(log, 1)
    receiver.error = None
    hear(log, b"2")
    await settled(log, 2)
    assert (log.kept, log.dropped) == (1, 1)


async def test_what_nothing_can_be_learned_of_is_counted_apart() -> None:
    receiver = Receiver()
    receiver.kept = 1
    log = ExchangeLog(False, receiver)
    for at in range(3):
        hear(log, str(at).encode())
    await settled(log, 3)
    assert (log.kept, log.passed_over, log.dropped) == (1, 2, 0)


def test_the_largest_message_is_bounded() -> None:
    assert 2 * exchanges.MAX_BYTES * exchanges.MAX_AT_ONCE <= 4 * 2**20
