"""The step barrier: one step or one hold at a time, holders first, every wait limited."""

import secrets
import threading
from collections.abc import Callable

import pytest

from actors.barrier import StepBarrier

LIMIT_S = 20.0
"""Only a deadlock takes this long."""
SHORT_S = 0.01


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(LIMIT_S)
    return not thread.is_alive()


def hold_of(barrier: StepBarrier, limit_s: float) -> str | None:
    """A hold under a token of its own; None if it was not granted."""
    token = secrets.token_hex(4)
    return token if barrier.hold(token, limit_s) else None


def test_a_hold_that_was_given_up_before_it_began_is_not_granted() -> None:
    """The call that asked for it was late: its caller has gone, and would never release it."""
    barrier = StepBarrier()
    assert not barrier.release("late")
    assert not barrier.hold("late", SHORT_S)
    assert barrier.hold("other", SHORT_S)


def test_hold_and_release() -> None:
    barrier = StepBarrier()
    token = hold_of(barrier, LIMIT_S)
    assert token is not None
    assert barrier.release(token)
    with barrier.step():
        pass


def test_hold_waits_for_the_step_in_progress() -> None:
    barrier, order, is_stepping = StepBarrier(), [], threading.Event()
    go_on = threading.Event()

    def step() -> None:
        with barrier.step():
            is_stepping.set()
            assert go_on.wait(LIMIT_S)
            order.append("step over")

    def hold() -> None:
        assert hold_of(barrier, LIMIT_S) is not None
        order.append("held")

    stepper = started(step)
    assert is_stepping.wait(LIMIT_S)
    assert not barrier.is_awaited
    holder = started(hold)
    holder.join(SHORT_S)
    assert holder.is_alive() and barrier.is_awaited
    go_on.set()
    assert ended(holder) and ended(stepper) and not barrier.is_awaited
    assert order == ["step over", "held"]


def test_step_waits_for_the_holder() -> None:
    barrier, order = StepBarrier(), []
    token = hold_of(barrier, LIMIT_S)
    assert token is not None

    def step() -> None:
        with barrier.step():
            order.append("step")

    stepper = started(step)
    stepper.join(SHORT_S)
    assert stepper.is_alive()
    order.append("release")
    assert barrier.release(token)
    assert ended(stepper)
    assert order == ["release", "step"]


def test_holder_goes_before_the_next_step_of_a_busy_stepper() -> None:
    barrier, steps, stop = StepBarrier(), [0], threading.Event()

    def step_back_to_back() -> None:
        while not stop.is_set():
            with barrier.step():
                steps[0] += 1

    stepper = started(step_back_to_back)
    for _ in range(50):
        token = hold_of(barrier, LIMIT_S)
        assert token is not None
        before = steps[0]
        threading.Event().wait(0.001)
        assert steps[0] == before, "no step runs under a hold"
        assert barrier.release(token)
    stop.set()
    assert ended(stepper)


def test_hold_gives_up_after_its_limit_and_steps_go_on() -> None:
    barrier = StepBarrier()
    with barrier.step():
        assert hold_of(barrier, SHORT_S) is None
    with barrier.step():
        pass
    token = hold_of(barrier, LIMIT_S)
    assert token is not None and barrier.release(token)


def test_second_holder_waits_for_the_first() -> None:
    barrier = StepBarrier()
    first = hold_of(barrier, LIMIT_S)
    assert first is not None
    assert hold_of(barrier, SHORT_S) is None
    assert barrier.release(first)
    second = hold_of(barrier, LIMIT_S)
    assert second is not None and second != first


def test_release_of_a_hold_that_is_over_says_so() -> None:
    barrier = StepBarrier()
    first = hold_of(barrier, LIMIT_S)
    assert first is not None
    assert barrier.release(first)
    assert not barrier.release(first)
    second = hold_of(barrier, LIMIT_S)
    assert second is not None
    assert not barrier.release(first), "an old token does not end a new hold"
    assert barrier.release(second)


def test_step_that_fails_frees_the_barrier() -> None:
    barrier = StepBarrier()
    with pytest.raises(ZeroDivisionError), barrier.step():
        raise ZeroDivisionError
    assert hold_of(barrier, SHORT_S) is not None
