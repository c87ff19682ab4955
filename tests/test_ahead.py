"""Threads that work ahead: in order, not too far, and none is left."""

import threading
from collections.abc import Iterator

import pytest

from apollo.journal.ahead import ahead, beside
from apollo.journal.disk import DiskFailed
from apollo.journal.retention import DAY_S, Retention, thin
from apollo.journal.slots import SlotDamaged
from tests.crashes import FAR_S, Story, Teller, first_disk, open_
from tests.model_disk import ModelDisk


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    first = threading.Event()

    def slow_at_first(item: int) -> int:
        if threads > 1 and item == 0:
            assert first.wait(20)  # Until a later one is done.
        if item == 1:
            first.set()
        return item * item

    assert list(ahead(slow_at_first, range(9), threads)) == [n * n for n in range(9)]


@pytest.mark.parametrize("threads", [1, 3])
def test_nobody_works_further_ahead_than_there_are_threads(threads: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    for used, result in enumerate(ahead(lambda item: item, items(), threads), start=1):
        assert result == used - 1
        assert len(taken) <= used + threads


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_comes_in_its_turn_and_leaves_no_thread(threads: int) -> None:
    before = threading.active_count()
    results = ahead(lambda item: 12 // item, [6, 3, 0, 1], threads)
    assert [next(results), next(results)] == [2, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before


def test_a_journal_with_two_threads_does_the_same_to_the_disk_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So what is shown of crashes with one thread holds for several."""
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)

    def life(threads: int) -> ModelDisk:
        disk = first_disk()
        monkeypatch.setattr("tests.crashes.THREADS", threads)
        teller = Teller(disk, Story())
        for _ in range(3):
            teller.commit()
            teller.publish()
        teller.roll_back(1)
        thin(teller.journal, 1_800_000_000.0 + FAR_S, Retention(max_age_s=DAY_S))
        open_(disk)
        return disk

    one, two = life(1), life(2)
    assert len(one.log) > 100 and one.log == two.log


@pytest.mark.parametrize("threads", [1, 2])
def test_a_work_that_fails_beside_a_block_that_fails_is_what_is_raised(threads: int) -> None:
    """A sync that failed must not be taken for a mere read that did not compare."""
    is_over = threading.Event()

    def sync() -> None:
        assert threads == 1 or is_over.wait(20)
        raise DiskFailed("cannot sync")

    before = threading.active_count()
    with pytest.raises(DiskFailed), beside(sync, threads):
        is_over.set()
        raise SlotDamaged("it was read back otherwise")
    assert threading.active_count() == before
