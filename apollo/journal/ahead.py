"""A few threads that work ahead of the one which uses their results in order.

Hashing, compressing and the disk's own work let go of Python's lock, so they go on side by side.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`work` of each item, in order; at most `threads` of them are worked at or wait to be used.

    One thread means none beside the caller's. Whatever `work` raises is raised in its turn.
    """
    if threads == 1:
        yield from map(work, items)
        return
    todo = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        running = deque[Future[R]](pool.submit(work, item) for item in islice(todo, threads))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(work, item) for item in islice(todo, 1))
            yield result


@contextmanager
def beside(work: Callable[[], object], threads: int) -> Iterator[None]:
    """`work` goes on beside what the block does, and is done when that ends.

    With one thread it is done before. What `work` raises is raised at the block's end.
    """
    if threads == 1:
        work()
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            yield
        finally:
            done.result()  # A sync that fails counts more than whatever the block found.
