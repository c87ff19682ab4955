"""The memory of processes: what is theirs, and what they share, is told apart."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Final

from actors.footprint import footprint, give_back

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
