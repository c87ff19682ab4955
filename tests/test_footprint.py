"""The memory of processes: what is theirs, and what they share, is told apart."""

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Final

from actors.footprint import footprint, give_back, map_large_blocks

MIB: Final = 2**20
SIZE: Final = 48 * MIB


def hold(name: str, pipe: Connection) -> None:
    """Touch every page of the shared memory and as much again of its own, and wait."""
    shared = SharedMemory(name)
    assert shared.buf is not None
    shared.buf[:] = bytes(range(256)) * (SIZE // 256)
    own = bytearray(os.urandom(1024) * (SIZE // 1024))
    pipe.send(len(own))
    pipe.recv()
    shared.close()


def test_own_and_shared_pages_are_told_apart_and_processes_are_added_up() -> None:
    context = multiprocessing.get_context("spawn")
    shared = SharedMemory(create=True, size=SIZE)
    ours, theirs = context.Pipe()
    child = context.Process(target=hold, args=(shared.name, theirs))
    before = footprint([os.getpid()])
    try:
        child.start()
        assert ours.poll(60) and ours.recv() == SIZE
        assert child.pid is not None and before is not None
        bytes(shared.buf or b"")  # Now it is mapped twice.
        of_child = footprint([child.pid])
        both = footprint([child.pid, os.getpid(), 2**22 + 1])
        assert of_child is not None and both is not None
        assert SIZE <= of_child.private_bytes < 2.5 * SIZE
        assert of_child.shared_bytes >= SIZE
        assert both.shared_bytes - of_child.shared_bytes - before.shared_bytes >= 0.9 * SIZE
        assert both.private_bytes > of_child.private_bytes
    finally:
        ours.send(None)
        child.join(30)
        shared.close()
        shared.unlink()
    assert footprint([child.pid]) is None, "it has ended"


def own_bytes() -> int:
    found = footprint([os.getpid()])
    assert found is not None
    return found.private_bytes


def test_what_was_freed_under_something_kept_is_given_back() -> None:
    blocks = [bytearray(100_000) for _ in range(1000)]
    kept = blocks[9::10]  # Among them: without being asked, glibc returns only what is last.
    del blocks
    before = own_bytes()
    give_back()
    assert before - own_bytes() > 50_000_000 and len(kept) == 100


def free_in_threads(is_mapped: bool, pipe: Connection) -> None:
    """Say what a process still has after its threads have freed large blocks."""
    if is_mapped:
        map_large_blocks()
    before, all_hold = own_bytes(), threading.Barrier(8)

    def run() -> None:
        for _ in range(2):  # The first that is freed teaches glibc where to take the second from.
            block = [bytearray(20 * MIB)]
            all_hold.wait()
            block.clear()
            all_hold.wait()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    give_back()
    pipe.send(own_bytes() - before)


def test_what_threads_have_freed_is_given_back_if_it_was_mapped() -> None:
    context, kept = multiprocessing.get_context("spawn"), []
    for is_mapped in (False, True):
        ours, theirs = context.Pipe()
        child = context.Process(target=free_in_threads, args=(is_mapped, theirs), daemon=True)
        child.start()
        assert ours.poll(60)
        kept.append(ours.recv())
        child.join(30)
    assert kept[0] > 40 * MIB, "glibc has kept nothing: it is not needed any more"
    assert kept[1] < 10 * MIB
