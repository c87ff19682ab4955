"""How situations are asked for: from memories that collide, never with the instruction."""

import asyncio
import random

import pytest

from actors.dream import library, scenario
from actors.dream.behaviour import Behaviour
from actors.dream.scenario import Seed, collide, fault, prompt, write
from tests.fake_model import FakeModel

ANY = Behaviour.model_validate(
    {"name": "brief", "instruction": "Reply tersely.", "checks": {"max_words": 5}}
)
KITCHEN = ANY.model_copy(update={"topic": "cooking", "tier": 2})
MEMORIES = [f"I own {number} hats." for number in range(10)]


def test_two_or_three_memories_collide_and_the_same_draw_gives_the_same() -> None:
    seeds = [collide(MEMORIES, number, random.Random(number)) for number in range(50)]
    assert {len(seed.memories) for seed in seeds} == {2, 3}
    assert all(len(set(seed.memories)) == len(seed.memories) for seed in seeds)
    assert seeds == [collide(MEMORIES, number, random.Random(number)) for number in range(50)]
    assert len({seed.memories for seed in seeds}) > 40


def test_a_single_memory_is_enough() -> None:
    assert collide(["I own a hat."], 0, random.Random(0)).memories == ("I own a hat.",)


def test_the_writer_sees_memories_and_topic_and_never_the_instruction() -> None:
    seed = Seed(("I own a hat.", "I own a cat."), 3)
    text = prompt(seed, KITCHEN, library.scenario_examples())
    assert text.endswith("Notes: I own a hat. I own a cat.\nAbout: cooking\nSays:")
    assert text.count("Says:") == 1 + scenario.NUM_EXAMPLES
    assert "tersely" not in text and "About" not in prompt(seed, ANY, []).split("Says:")[-1]


def test_draws_in_a_row_begin_alike_and_later_ones_otherwise() -> None:
    examples = library.scenario_examples()
    shown = [
        prompt(Seed((f"I own {number} hats.",), number), ANY, examples).rpartition("Notes:")[0]
        for number in range(2 * scenario.NUM_SHARING)
    ]
    assert [len(set(shown[: scenario.NUM_SHARING])), len(set(shown))] == [1, 2]


def test_what_did_not_come_to_its_end_is_no_scenario() -> None:
    model = FakeModel(writes=lambda prompt, seed: "And so it went on and on", is_endless=True)
    assert asyncio.run(write(model, Seed((), 0), ANY, [], 0.7)) == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it did not come to its end"),
        ("Oh no.", "2 words, and 3 to 60 are a message"),
        ("well " * 61, "61 words, and 3 to 60 are a message"),
        ("Can I grow figs? Notes: I own a hat.", "it goes on with the examples"),
        ("Can I grow figs on my balcony?", None),
    ],
)
def test_what_is_no_message_is_found_out(text: str, why: str | None) -> None:
    assert fault(text) == why
