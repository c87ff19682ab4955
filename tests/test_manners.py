"""A dream's questions wait for clients, and are given up when one comes."""

import asyncio
from collections.abc import Callable

import pytest

from actors.dream.manners import PoliteModel
from tests.fake_model import FakeModel


class Clients:
    """Says for how long nobody has asked anything."""

    def __init__(self) -> None:
        self.idle = float("inf")

    def idle_s(self) -> float:
        return self.idle


def run(story: Callable[[FakeModel, Clients, PoliteModel], object], delay_s: float = 0.0) -> None:
    async def told() -> None:
        clients, model = Clients(), FakeModel(delay_s=delay_s)
        result = story(model, clients, PoliteModel(model, clients.idle_s, 2.0))
        assert asyncio.iscoroutine(result)
        await asyncio.wait_for(result, 30)

    asyncio.run(told())


def test_an_idle_machine_is_asked_at_once() -> None:
    async def story(model: FakeModel, clients: Clients, polite: PoliteModel) -> None:
        assert (await polite.answer([{"role": "user", "content": "Hi"}]))[0].text == "It is so."
        assert polite.waited_s == 0

    run(story)


def test_nothing_is_asked_until_clients_have_been_quiet_for_a_while() -> None:
    async def story(model: FakeModel, clients: Clients, polite: PoliteModel) -> None:
        clients.idle = 0.0
        asking = asyncio.create_task(polite.complete("Once"))
        await asyncio.sleep(0.2)
        clients.idle = 1.9
        await asyncio.sleep(0.2)
        assert model.asked == [] and not asking.done()
        clients.idle = 2.0
        await asking
        assert polite.waited_s == pytest.approx(0.4, abs=0.3)

    run(story)


def test_what_is_being_computed_is_given_up_for_a_client_and_asked_again() -> None:
    async def story(model: FakeModel, clients: Clients, polite: PoliteModel) -> None:
        asking = asyncio.create_task(polite.logprobs([{"role": "user", "content": "Hi"}], "So"))
        await asyncio.sleep(0.3)
        assert model.asked == ["So"]
        clients.idle = 0.0
        await asyncio.sleep(0.3)
        model.delay_s = 0.0
        assert not asking.done()
        clients.idle = 5.0
        assert len(await asking) == 2
        assert model.asked == ["So", "So"]

    run(story, delay_s=20)


def test_who_waits_can_be_cancelled() -> None:
    async def story(model: FakeModel, clients: Clients, polite: PoliteModel) -> None:
        clients.idle = 0.0
        asking = asyncio.create_task(polite.prefer("A or B?", ["A", "B"]))
        await asyncio.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert model.asked == []

    run(story)
