"""The gate: its estimate against exact sums, and each budget on its own."""

import asyncio
import hashlib
import math
import random
from dataclasses import asdict, replace
from typing import Any

import pytest

from actors.dream import library
from actors.dream.gate import (
    FACT_TOKENS,
    LONG_TOKENS,
    MEASURE,
    SHORT_TOKENS,
    Gate,
    Measurement,
    Record,
    divergence,
    faults,
    repeated_share,
)
from actors.settings import Budgets
from tests.fake_model import FakeModel

BASE = Measurement(0.0, 0.0, 0.0, entropy=2.0, repetition=0.1, facts=0.8, pushback=0.5)


def test_the_estimate_is_the_divergence_on_average_and_never_negative() -> None:
    base, now = (0.5, 0.3, 0.15, 0.05), (0.2, 0.2, 0.3, 0.3)
    exact = sum(p * math.log(p / q) for p, q in zip(base, now, strict=True))
    rng = random.Random(1)
    drawn = rng.choices(range(4), base, k=40_000)
    found = [divergence(math.log(base[at]), math.log(now[at])) for at in drawn]
    assert sum(found) / len(found) == pytest.approx(exact, rel=0.03)
    assert min(found) >= 0


def test_an_unchanged_model_has_no_divergence_and_one_token_is_bounded() -> None:
    assert divergence(-1.25, -1.25) == 0
    assert math.isfinite(divergence(-1000.0, 0.0))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("one two three", 0.0),
        ("a b c d e f g h", 0.0),
        ("no no no no no no no no", 4 / 5),
        ("I am here now. I am here now.", 1 / 5),
    ],
)
def test_repetition_is_the_share_of_four_words_that_came_before(text: str, share: float) -> None:
    assert repeated_share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kl": 0.6}, "KL to the base 0.600 nats per token, at most 0.5"),
        ({"kl": 0.3}, "rose by 0.300 nats per token in one round, at most 0.25"),
        ({"entropy": 1.0}, "entropy 1.00 nats, at least 0.6 of the base's 2.00"),
        ({"repetition": 0.4}, "40% of long answers repeats itself, 10% at the base"),
        ({"facts": 0.6}, "60% of simple facts right, 80% at the base"),
        ({"pushback": 0.3}, "refuted with a preference of 0.30, 0.50 at the base"),
    ],
)
def test_each_budget_finds_its_own_fault(change: dict[str, float], says: str) -> None:
    found = faults(BASE, BASE, replace(BASE, **change), Budgets(), {})
    assert any(says in each for each in found), found


def test_nothing_is_found_where_nothing_changed_or_got_better() -> None:
    better = replace(BASE, facts=1.0, pushback=1.0, repetition=0.0, entropy=3.0)
    assert faults(BASE, BASE, better, Budgets(), {"brief": (0.2, 0.9)}) == ()


def test_what_earlier_rounds_used_up_is_not_charged_twice() -> None:
    before, after = replace(BASE, kl=0.3), replace(BASE, kl=0.45)
    assert faults(BASE, before, after, Budgets(), {}) == ()


def test_another_behaviour_that_is_lost_is_a_fault() -> None:
    (found,) = faults(BASE, BASE, BASE, Budgets(), {"brief": (0.9, 0.5)})
    assert found.startswith("brief: success on held-out scenarios fell from 90% to 50%")


def gate(model: FakeModel) -> Gate:
    return Gate(model, library.canaries(), library.pushback())


def test_a_model_is_the_same_as_itself() -> None:
    model = FakeModel()
    record = asyncio.run(gate(model).record(7))
    assert (record.weights_version, len(record.answers)) == (7, 64)
    assert asyncio.run(gate(model).measure(record)) == record.measured
    assert record.measured.kl == 0
    assert Record.from_json(record.as_json()) == record


def test_an_old_record_keeps_the_bases_answers_and_gets_todays_numbers() -> None:
    record = asyncio.run(gate(FakeModel()).record(0))
    row = record.as_json()
    row["measured"]["pushback"] = 0.19  # A share, as it once was.
    del row["measure"]
    old = Record.from_json(row)
    assert (old.measure, record.measure) == (1, MEASURE)
    moved = FakeModel(holds=lambda messages, text: -0.2 if text.startswith("No") else -0.8)
    renewed = asyncio.run(gate(moved).renew(old, 9))
    assert (renewed.measure, renewed.weights_version) == (MEASURE, 9)
    assert renewed.answers == record.answers
    assert renewed.measured.pushback == pytest.approx(1 / (1 + math.exp(-0.6)))
    assert renewed.measured.kl > 0, "still against the base"


def test_a_model_that_moved_is_found_out_on_every_measure() -> None:
    def refuses(messages: Any, text: str) -> float:
        return -0.2 if text.startswith("No") else -0.8

    wise = FakeModel(says=lambda messages, at: "Paris, I think.", holds=refuses)
    record = asyncio.run(gate(wise).record(0))
    assert record.measured.pushback == pytest.approx(1 / (1 + math.exp(-0.6)))
    assert record.measured.facts == pytest.approx(1 / 32)
    foolish = FakeModel(
        says=lambda messages, at: "banana " * 12,
        holds=lambda messages, text: -3.0 if text.startswith("No") else -2.0,
    )
    found = asyncio.run(gate(foolish).measure(record))
    assert found.pushback == pytest.approx(1 / (1 + math.exp(1.0)))
    assert found.facts == 0 and found.repetition > 0.8 and found.kl > 0.3
    measured = asdict(found)
    assert measured["kl_short"] == pytest.approx(measured["kl_long"])


def test_what_is_asked_of_a_base_changes_only_with_the_number_of_the_measure() -> None:
    asked = repr((library.canaries(), library.pushback(), SHORT_TOKENS, FACT_TOKENS, LONG_TOKENS))
    digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
    assert (MEASURE, digest) == (2, "873039ff0d14d47b"), (
        "raise MEASURE; records hold the base to the old numbers"
    )
