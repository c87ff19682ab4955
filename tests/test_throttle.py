"""The throttle in a made-up world with a clock of its own, against the duty that is right there.

work and rests --> share of the last token's time that was work --> how long that token took
       ^-------------- the throttle, which sees only those times <-------------+
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors.throttle import FIRST_DUTY, INCREASE, LATE_SHARE, MIN_REST_S, NUM_LOOKED_AT, Throttle
from actors.traffic import Traffic
from tests import small_cell

WORK_S = 0.006
"""Between two breaths: a layer forward, a tensor backward."""


@dataclass
class World:
    """Time passes by work and by sleep; tokens come meanwhile, later the more work there is."""

    idle_ms: float = 60.0
    slower: float = 0.6
    """A token that is computed all the while beside the trainer takes so much longer."""
    jitter: float = 0.05
    now: float = 0.0
    is_answering: bool = True
    gaps: list[float] = field(default_factory=list)
    worked: float = 0.0
    _since: float = 0.0
    _left: float = 1.0
    """Of the token that is being computed; 1 is one on an idle machine, without noise."""
    _noise: random.Random = field(default_factory=lambda: random.Random(0))

    def idle_s(self) -> float:
        return 0.0 if self.is_answering else 1.0

    def num_gaps(self) -> int:
        return len(self.gaps)

    def gaps_ms(self, since: int) -> list[float]:
        return self.gaps[since:]

    def pass_time(self, seconds: float, *, is_work: bool) -> None:
        self.worked += seconds * is_work
        whole_s = self.idle_ms / 1000 * (1 + self.slower * is_work)
        while self.is_answering and seconds >= (to_go_s := self._left * whole_s):
            self.now, seconds = self.now + to_go_s, seconds - to_go_s
            self.gaps.append(1000 * (self.now - self._since))
            self._since, self._left = self.now, 1 + self._noise.uniform(-self.jitter, self.jitter)
        self.now += seconds
        self._left -= seconds / whole_s

    def gap_at(self, duty: float, noise: float) -> float:
        return self.idle_ms * (1 + noise) / (1 - duty * self.slower / (1 + self.slower))

    def right_duty(self, budget_ms: float) -> float:
        """The largest at which at most LATE_SHARE of the tokens are late: by trying them all."""
        duties = [at / 1000 for at in range(1001)]
        noise = self.jitter * (1 - 2 * LATE_SHARE)  # Uniform: so many of the draws are above it.
        return max(duty for duty in duties if self.gap_at(duty, noise) <= budget_ms)

    def throttle(
        self, budget_ms: float | None, is_urgent: Callable[[], bool] = lambda: False
    ) -> Throttle:
        def sleep(seconds: float) -> None:
            self.pass_time(seconds, is_work=False)

        return Throttle(budget_ms, 0.1, self, is_urgent, lambda: self.now, sleep)

    def compute(self, throttle: Throttle, seconds: float) -> float:
        """Work and breathe for so long; returns the share of it that was work."""
        begun, worked = self.now, self.worked
        while self.now - begun < seconds:
            self.pass_time(WORK_S, is_work=True)
            throttle.breathe()
        return (self.worked - worked) / (self.now - begun)


def late_share(gaps: list[float], budget_ms: float) -> float:
    return sum(gap > budget_ms for gap in gaps) / len(gaps)


@pytest.mark.parametrize("budget_ms", [70, 75, 80, 85, 90])
def test_the_duty_comes_to_what_the_budget_allows_and_stays_about_there(budget_ms: float) -> None:
    world = World()
    right = world.right_duty(budget_ms)
    assert 0.15 < right < 0.9, "a world in which nothing is decided proves nothing"
    throttle = world.throttle(budget_ms)
    throttle.begin()
    world.compute(throttle, 60)
    begun = len(world.gaps)
    found = world.compute(throttle, 240)
    # A saw tooth: from a step above what is right down to 0.7 of it, and up again.
    assert 0.6 * right < found < right + INCREASE
    assert late_share(world.gaps[begun:], budget_ms) < 0.25
    free = World()
    free.compute(free.throttle(None), 240)
    assert late_share(free.gaps, budget_ms) > 0.9, "without the budget they are late"


def test_a_budget_that_costs_nothing_is_no_throttle_in_the_end() -> None:
    world = World()
    throttle = world.throttle(200)
    throttle.begin()
    world.compute(throttle, 60)
    assert throttle.duty == 1.0
    assert world.compute(throttle, 20) == pytest.approx(1.0)


def test_a_budget_that_cannot_be_kept_leaves_the_least_duty() -> None:
    world = World()
    throttle = world.throttle(30)
    throttle.begin()
    world.compute(throttle, 60)
    assert throttle.duty == 0.1
    assert world.compute(throttle, 20) == pytest.approx(0.1, rel=0.05)


def test_nobody_is_answered_and_it_computes_freely_and_remembers() -> None:
    world = World()
    throttle = world.throttle(75)
    throttle.begin()
    world.compute(throttle, 60)
    learned = throttle.duty
    world.is_answering = False
    assert throttle.duty == 1.0
    assert world.compute(throttle, 5) == pytest.approx(1.0)
    world.is_answering = True
    assert throttle.duty == learned < 1
    assert world.compute(throttle, 1) < learned + 0.1, "from the first moment on"


def test_an_end_of_the_answers_ends_a_rest() -> None:
    world = World()
    throttle = world.throttle(30)
    throttle.begin()
    world.compute(throttle, 60)
    world.pass_time(10, is_work=True)  # Nothing to breathe at: 90 s of rest are owed.
    ends = world.now + 1

    def idle_s() -> float:
        return float(world.now >= ends)

    world.idle_s = idle_s  # type: ignore[method-assign]
    assert throttle.breathe() == pytest.approx(1, abs=0.05)
    assert throttle.breathe() == 0


def test_somebody_who_waits_for_the_work_is_not_kept_waiting() -> None:
    is_urgent = [False]
    world = World()
    throttle = world.throttle(30, lambda: is_urgent[0])
    throttle.begin()
    world.compute(throttle, 60)
    is_urgent[0] = True
    assert world.compute(throttle, 5) == pytest.approx(1.0)


def test_what_was_seen_without_work_does_not_count() -> None:
    """Half an hour of answers while nothing is learned would say that all is well."""
    world = World()
    throttle = world.throttle(75)
    throttle.begin()
    world.compute(throttle, 60)
    learned = throttle.duty
    for _ in range(10 * NUM_LOOKED_AT):
        world.gaps.append(60.0)
    throttle.begin()
    world.pass_time(WORK_S, is_work=True)
    throttle.breathe()
    assert throttle.duty == learned


def test_no_rest_is_owed_for_what_lies_between_two_steps() -> None:
    """Sleeping for the duty, waiting for room on the disk, for a teacher, or for a checkpoint."""
    world = World()
    throttle = world.throttle(75)
    throttle.begin()
    world.pass_time(10, is_work=False)
    throttle.resume()
    world.pass_time(WORK_S, is_work=True)
    rested = throttle.breathe()
    assert rested == pytest.approx(WORK_S * (1 - throttle.duty) / throttle.duty)


def test_until_it_has_seen_enough_it_takes_half_and_rests_are_short() -> None:
    world = World()
    throttle = world.throttle(75)
    throttle.begin()
    rests = []
    for _ in range(100):
        world.pass_time(WORK_S, is_work=True)
        rests.append(throttle.breathe())
    assert throttle.duty == FIRST_DUTY
    assert max(rests) == pytest.approx(WORK_S * (1 - FIRST_DUTY) / FIRST_DUTY)
    world.pass_time(MIN_REST_S / 4, is_work=True)
    assert throttle.breathe() == 0, "less is saved up"
    world.pass_time(MIN_REST_S, is_work=True)
    assert throttle.breathe() == pytest.approx(1.25 * MIN_REST_S)


def test_without_a_budget_it_never_rests() -> None:
    world = World()
    assert world.compute(world.throttle(None), 60) == pytest.approx(1.0)


def test_a_real_trainer_rests_within_its_steps_while_anybody_is_answered_and_only_then(
    tmp_path: Path,
) -> None:
    small_cell.adopt(tmp_path)
    with small_cell.boot(tmp_path, tmp_path / "run", latency_budget_ms=1, min_duty=0.2) as cell:
        door = Traffic(cell.paths.traffic, is_writable=True)

        def rested() -> float:
            cell.settle()
            steps = cell.trainer.report()
            assert steps.last_rested_s is not None and steps.last_step_s > 0
            return float(steps.last_rested_s)

        cell.teach("alone")
        assert rested() == 0.0 and cell.trainer.report().duty == 1.0
        door.enter()
        for _ in range(10 * NUM_LOOKED_AT):
            door.note_gap(1_000_000_000)
        cell.teach("beside an answer")
        assert rested() > 0.0
        assert cell.trainer.report().duty == FIRST_DUTY, "gaps of before count for nothing"
        door.leave()
        cell.teach("alone again")
        assert rested() == 0.0 and cell.trainer.report().duty == 1.0
