"""A model directory of a few hundred words, and what can be done with it in microseconds."""

import numpy as np
from safetensors.numpy import load, save

from apollo.journal.codec import Words
from apollo.journal.disk import Disk
from apollo.weights import manifest
from apollo.weights.manifest import Manifest

NAME = "tiny"
CHUNK_WORDS = 8
PUBLIC = f"models/{NAME}"
CONFIG = b'{"model_type": "tiny"}'

State = dict[str, Words]
"""Words of each tensor, by name."""


def first_state() -> State:
    """Two files' worth of tensors: one float32, two of 16 bits, one of them frozen."""
    rng = np.random.default_rng(0)
    return {
        "embed": rng.integers(0, 1 << 16, 10, np.uint16),
        "layer.a": rng.standard_normal(12).astype(np.float32).view(np.uint32),
        "layer.b": rng.integers(0, 1 << 16, 9, np.uint16),
    }


def learned(state: State, seed: int) -> State:
    """Another state: every float32 word moved a little, some 16-bit words by one, one frozen."""
    rng = np.random.default_rng(seed)
    some = rng.random(9) < 0.4
    some[seed % 9] = True
    return {
        "embed": state["embed"],
        "layer.a": state["layer.a"] + rng.integers(1, 3000, 12, np.uint32),
        "layer.b": state["layer.b"] + some.astype(np.uint16),
    }


def files_of(state: State) -> dict[str, bytes]:
    """The weights files; 16-bit words are float16 there, which numpy can say."""

    def tensors(names: tuple[str, ...]) -> dict[str, np.ndarray]:
        kinds = {2: np.float16, 4: np.float32}
        return {name: state[name].view(kinds[state[name].itemsize]) for name in names}

    return {
        "a.safetensors": save(tensors(("layer.a",))),
        "b.safetensors": save(tensors(("embed", "layer.b"))),
    }


def put_model(disk: Disk, state: State) -> None:
    """Write the directory as adoption does, durably."""
    for path in ("models", "state", PUBLIC, f"state/{NAME}"):
        disk.make_directory(path)
    files = files_of(state) | {"config.json": CONFIG}
    held = Manifest("tiny", "float32", {n: len(data) for n, data in files.items()}, created=0.0)
    for name, data in (*files.items(), (manifest.FILE_NAME, manifest.encode(held))):
        disk.create(f"{PUBLIC}/{name}")
        disk.write(f"{PUBLIC}/{name}", 0, data)
        disk.sync(f"{PUBLIC}/{name}")
    for path in (PUBLIC, "models", "state"):
        disk.sync(path)


def load_public(disk: Disk, directory: str = PUBLIC) -> State:
    """What a stock loader sees; raises whatever it raises."""
    found: State = {}
    for name in disk.names(directory):
        if name.endswith(".safetensors"):
            for tensor, values in load(disk.read(f"{directory}/{name}")).items():
                found[tensor] = values.view({2: np.uint16, 4: np.uint32}[values.itemsize])
    return found


def is_same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(words, other[name]) for name, words in one.items()
    )
