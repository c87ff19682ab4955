"""What fails is drawn, what is learned rests, and what rests is looked at again."""

import random
from collections import Counter

import pytest

from actors.dream.curriculum import (
    COOLEST,
    HOTTEST,
    RETEST_ROUNDS,
    Progress,
    after_test,
    draw,
    due,
    temperature,
)


def test_what_fails_more_is_drawn_more() -> None:
    learning = [Progress("easy", 0.9, failure_rate=0.1), Progress("hard", 0.9, failure_rate=0.9)]
    rng = random.Random(0)
    drawn = Counter(each.name for _ in range(1000) if (each := draw(learning, rng)))
    assert 50 < drawn["easy"] < 150 and drawn["hard"] == 1000 - drawn["easy"]


def test_what_never_fails_is_drawn_at_times() -> None:
    learning = [Progress("known", 1.0, failure_rate=0.0), Progress("new", 0.9)]
    rng = random.Random(0)
    names = {each.name for _ in range(500) if (each := draw(learning, rng))}
    assert names == {"known", "new"}


@pytest.mark.parametrize("standing", ["resting", "stopped"])
def test_what_rests_or_was_stopped_is_not_drawn(standing: str) -> None:
    assert draw([Progress("a", 0.9, standing)], random.Random(0)) is None  # type: ignore[arg-type]


def test_if_none_learns_the_one_tested_longest_ago_may_be_tested_again() -> None:
    stopped, late, early = (
        Progress("stopped", 0.9, "stopped", tested_round=1),
        Progress("late", 0.9, "resting", tested_round=7),
        Progress("early", 0.9, "resting", tested_round=3),
    )
    all_of_them, rng = [stopped, late, early], random.Random(0)
    assert draw(all_of_them, rng) is None
    assert draw(all_of_them, rng, may_retest=True) == early
    assert draw([stopped], rng, may_retest=True) is None
    learning = Progress("new", 0.9)
    assert draw([*all_of_them, learning], rng, may_retest=True) == learning


def test_sampling_is_freer_where_it_fails() -> None:
    assert temperature(0.0) == COOLEST < temperature(0.5) < temperature(1.0) == HOTTEST


def test_at_its_target_it_rests_and_below_it_learns_again() -> None:
    learning = Progress("a", 0.9)
    assert after_test(learning, 0.8, 1).standing == "learning"
    resting = after_test(learning, 0.9, 1)
    assert (resting.standing, resting.tested_round) == ("resting", 1)
    assert after_test(resting, 0.86, 2).standing == "resting", "a little below is noise"
    assert after_test(resting, 0.7, 2).standing == "learning"


def test_the_failure_rate_follows_the_tests() -> None:
    progress = Progress("a", 0.95)
    rates = []
    for number in range(1, 6):
        progress = after_test(progress, 0.8, number)
        rates.append(progress.failure_rate)
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.2, abs=0.03)


def test_what_was_stopped_stays_so_whatever_a_test_says() -> None:
    assert after_test(Progress("a", 0.9, "stopped"), 1.0, 3).standing == "stopped"


def test_what_rests_is_due_after_some_rounds() -> None:
    resting = [Progress("a", 0.9, "resting", 0.0, 3), Progress("b", 0.9, "learning", 1.0, 1)]
    assert due(resting, 3 + RETEST_ROUNDS - 1) == []
    assert [each.name for each in due(resting, 3 + RETEST_ROUNDS)] == ["a"]
