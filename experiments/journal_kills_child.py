"""The child of `journal_kills`: a small model whose states follow from numbers, and work on it.

Also the journals that are wrong on purpose, each in one way that a check of the parent must find.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import numpy as np
from safetensors.numpy import load_file, save_file

from apollo.journal import chain as chains
from apollo.journal.chain import Chain
from apollo.journal.codec import Words
from apollo.journal.disk import Disk, RealDisk
from apollo.journal.recovery import open_journal
from apollo.journal.slots import Slots
from apollo.weights import manifest
from apollo.weights.manifest import Manifest

NAME: Final = "small"
PUBLIC: Final = f"models/{NAME}"
CHUNK_WORDS: Final = 24_000
THREADS: Final = 2
TENSORS: Final[dict[str, dict[str, tuple[type[np.floating[Any]], int]]]] = {
    "a.safetensors": {"embed": (np.float32, 300_001), "norm": (np.float32, 2_048)},
    "b.safetensors": {"layer.a": (np.float16, 500_000), "layer.b": (np.float16, 333_333)},
}
"""2.9 MB in 49 chunks."""
STRETCH_WORDS: Final = 60_000
MOVED_SHARES: Final = (0.0, 0.002, 0.02, 0.6)
"""Of the words in a stretch; one of these is drawn for each tensor and state."""
WORDS: Final = {2: np.uint16, 4: np.uint32}
OPTIMIZER_BYTES: Final = 200_000
OPS: Final = {"commit": 3, "commit with optimizer": 3, "rollback": 3, "publish": 4}
"""What a child does after its recovery, and how often."""
WINDOW_S: Final = 0.02
"""How long the faults `no-draft` and `rename-first` leave a manifest without its bytes."""

State = dict[str, Words]
Tell = Callable[[str], None]


class Violation(Exception):
    """What was found is not what was acknowledged."""


@lru_cache(maxsize=16)
def state_of(seed: int, number: int) -> State:
    """Words of each tensor as commit `number` left them; 0 is the model as it was adopted."""
    rng = np.random.default_rng([seed, number])
    if number:
        return learned(state_of(seed, 0), rng)
    state: State = {}
    for tensors in TENSORS.values():
        for name, (dtype, count) in tensors.items():
            words = rng.standard_normal(count, np.float32).astype(dtype)
            state[name] = words.view(WORDS[words.itemsize])
    return state


def learned(state: State, rng: np.random.Generator) -> State:
    """Another state: a stretch of each tensor moved a little, here and there or throughout."""
    after = {name: words.copy() for name, words in state.items()}
    for words in after.values():
        count = min(STRETCH_WORDS, len(words))
        first = int(rng.integers(len(words) - count + 1))
        is_moved = rng.random(count, np.float32) < rng.choice(MOVED_SHARES)
        words[first : first + count] += is_moved * words.dtype.type(rng.integers(1, 300))
    after["norm"][:] += np.uint32(rng.integers(1, 1 << 31))  # So that no two states are equal.
    return after


def optimizer_of(seed: int, number: int) -> bytes:
    return random.Random(f"{seed} {number}").randbytes(OPTIMIZER_BYTES)


def put_model(root: Path, seed: int) -> None:
    """The directory as adoption leaves it."""
    directory = root / PUBLIC
    directory.mkdir(parents=True)
    (root / "state" / NAME).mkdir(parents=True)
    state = state_of(seed, 0)
    for file, tensors in TENSORS.items():
        words = {name: state[name].view(dtype) for name, (dtype, _) in tensors.items()}
        save_file(words, directory / file)
    (directory / "config.json").write_text('{"model_type": "small"}')
    manifest.write(directory, Manifest(NAME, "float32", manifest.sizes(directory), created=0.0))


def load_public(directory: Path) -> State:
    """What a stock loader sees."""
    found: State = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, values in load_file(path).items():
            found[name] = values.view(WORDS[values.itemsize])
    return found


def is_same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        words.dtype == other[name].dtype and np.array_equal(words, other[name])
        for name, words in one.items()
    )


def work(disk: Disk, seed: int, first: int, num_ops: int, tell: Tell, fault: str) -> None:
    """Recover, then `num_ops` operations numbered from `first`; tell each one's begin and end."""
    tell("begin recovery 0 0")
    recovered = open_journal(disk, NAME, chunk_words=CHUNK_WORDS, threads=THREADS)
    journal = recovered.journal
    if recovered.set_aside:
        raise Violation(f"a recovery set aside {', '.join(recovered.set_aside)}")
    tell(f"done {journal.newest.generation}")
    rng = random.Random(f"{seed} {first}")
    for number in range(first, first + num_ops):
        op = rng.choices(list(OPS), list(OPS.values()))[0].replace(" ", "_")
        goal = rng.choice(journal.chain.generations).generation
        if op == "publish" and journal.public.generation == journal.newest.generation:
            op = "commit"
        state = state_of(seed, number if op.startswith("commit") else 0)
        optimizer = None if op == "commit" else optimizer_of(seed, number)
        tell(f"begin {op} {number} {goal}")
        if fault == "hasty":
            tell(f"done {journal.newest.generation + (op != 'publish')}")
        if op == "publish":
            made = journal.publish()
        elif op == "rollback":
            made = journal.roll_back(goal, number)
        else:
            made = journal.commit(state, number, optimizer, number)
        if fault != "hasty":
            tell(f"done {made.generation}")


class Life(NamedTuple):
    """What is known of a child that has ended."""

    lines: list[str]
    is_killed: bool
    seconds: float


def run_child(
    root: Path,
    seed: int,
    first: int,
    num_ops: int,
    fault: str,
    meanwhile: Callable[[], None] | None = None,
) -> Life:
    """A child that is killed when `meanwhile` returns; without that it ends by itself.

    A fork of this process, which has imported everything, starts within milliseconds.
    """
    reading, writing = os.pipe()
    begun = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def tell(line: str) -> None:
            os.write(writing, f"{line}\n".encode())  # Short, so that it arrives whole or not.

        try:
            break_on_purpose(fault)
            work(RealDisk(root), seed, first, num_ops, tell, fault)
        except BaseException as error:
            tell(f"failed {type(error).__name__}: {error}"[:400].replace("\n", " "))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        if meanwhile is not None:
            meanwhile()
    finally:
        if meanwhile is not None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - begun
    with open(reading) as pipe:
        return Life(pipe.read().splitlines(), os.WIFSIGNALED(status), seconds)


def break_on_purpose(fault: str) -> None:
    """Make this process's journal wrong in the way of that name, see FAULTS."""
    if fault == "in-place":
        mock.patch.object(Slots, "swap", swap_in_place).start()
    elif fault == "no-draft":
        mock.patch.object(chains, "write", write_without_draft).start()
    elif fault == "rename-first":
        mock.patch.object(chains, "_put", put_and_sync_late).start()
    elif fault in FORGOTTEN:
        mock.patch.object(RealDisk, "sync", forgetful(RealDisk.sync, FORGOTTEN[fault])).start()


def swap_in_place(slots: Slots, hidden: str) -> None:
    disk = slots._disk
    for name in disk.names(hidden):
        data = disk.read(f"{hidden}/{name}")
        if name == manifest.FILE_NAME:
            chains.replace_file(disk, f"{slots.public}/{name}", data)
        else:
            disk.write(f"{slots.public}/{name}", 0, data)
            time.sleep(WINDOW_S)


def write_without_draft(disk: Disk, folder: str, chain: Chain) -> Chain:
    path = f"{folder}/{chains.manifest_name(chain.sequence)}"
    disk.create(path)
    time.sleep(WINDOW_S)
    disk.write(path, 0, chain.encode())
    disk.sync(path)
    return chain


def put_and_sync_late(disk: Disk, path: str, data: bytes) -> None:
    draft = f"{path}.draft"
    disk.create(draft, len(data))
    disk.write(draft, 0, data)
    disk.rename(draft, path)
    disk.sync(path.rpartition("/")[0])
    time.sleep(WINDOW_S)
    disk.sync(path)


def forgetful(
    sync: Callable[[RealDisk, str], None], forgotten: tuple[bool, ...]
) -> Callable[[RealDisk, str], None]:
    def sync_the_rest(disk: RealDisk, path: str) -> None:
        if disk.is_directory(path) not in forgotten:
            sync(disk, path)

    return sync_the_rest


FORGOTTEN: Final = {
    "no-sync": (False, True),
    "no-file-sync": (False,),
    "no-directory-sync": (True,),
}
"""Whether what is not synced is a directory."""

FAULTS: Final = {
    "hasty": "an operation is acknowledged before it is made",
    "in-place": "a publication writes over the public files",
    "no-draft": "a manifest is written under its own name",
}
POWER_FAULTS: Final = {
    "no-sync": "nothing is synced",
    "no-file-sync": "directories are synced, files are not",
    "no-directory-sync": "files are synced, directories are not",
    "rename-first": "a manifest gets its name before its bytes are synced",
}
"""Of these nothing is seen while the file system stays up, see `file_systems`."""
