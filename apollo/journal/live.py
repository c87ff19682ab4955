"""The live weights as the words that a journal commits: copied while the trainer stands still.

live tensors (shared memory of a CPU, or CUDA) --copy--> buffers of this process --> words by name
        or, with maps of what has changed: --take--> the changed words, on their device --> here
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from apollo.journal.changed import ChangedWords
from apollo.journal.codec import Words
from apollo.optim.changes import Taken, take
from apollo.optim.routing import matrix_shape
from apollo.weights import memory
from apollo.weights.change_maps import ChangeMaps
from apollo.weights.layout import WeightLayout

_INTEGERS = {2: torch.int16, 4: torch.int32}
_UNSIGNED = {2: "uint16", 4: "uint32"}


class Staging:
    """Memory for one copy of all weights; its pages are touched before anybody waits for them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], maps: ChangeMaps | None = None) -> None:
        self._tensors, self._maps = tensors, maps
        self._copies = {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for name, tensor in tensors.items()
        }

    def copy(self) -> None:
        """Take over what the tensors hold now, and clear the maps; the caller keeps them still."""
        for name, tensor in self._tensors.items():
            self._copies[name].copy_(tensor)
        if self._maps is not None:
            self._maps.clear()

    def words(self) -> dict[str, Words | ChangedWords]:
        """The bits of each copied tensor, in the order of its elements."""
        return {name: _words_of(copy) for name, copy in self._copies.items()}


class ChangedStaging:
    """What has changed, and whole copies only of tensors of which nothing is noted."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], maps: ChangeMaps) -> None:
        self._tensors, self._maps = tensors, maps
        unknown = tensors.keys() - maps.maps.keys() - maps.frozen
        self._whole = Staging({name: tensors[name] for name in unknown})
        self._taken: dict[str, Taken] = {}

    def copy(self) -> None:
        """Take what has changed, and clear the maps; the caller keeps the tensors still."""
        self._whole.copy()
        for name, changed_io in self._maps.maps.items():
            self._taken[name] = take(_matrix(self._tensors[name]), changed_io)

    def words(self) -> dict[str, Words | ChangedWords]:
        """What to commit after the generation since which the maps note changes."""
        words = self._whole.words()
        for name in self._maps.frozen:
            nothing = np.zeros(0, _UNSIGNED[self._tensors[name].itemsize])
            words[name] = ChangedWords(np.zeros((0, 0), np.uint8), 1, nothing)
        for name, taken in self._taken.items():
            columns = _matrix(self._tensors[name]).shape[1]
            octets_io = taken.changed_io.cpu().numpy()
            words[name] = ChangedWords(octets_io, columns, _words_of(taken.values.cpu()))
        return words


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(matrix_shape(tuple(tensor.shape)))


def _words_of(values: torch.Tensor) -> Words:
    integers = values.reshape(-1).view(_INTEGERS[values.itemsize])
    words: Words = integers.numpy().view(_UNSIGNED[values.itemsize])
    return words


def restore(layout_path: Path, directory: Path) -> None:
    """Write a model directory's values into the live tensors of the same names, in place."""
    live = memory.Mapping(WeightLayout.load(layout_path), is_writable=True).tensors()
    with torch.no_grad():
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as opened:
                for name in list(opened.keys()):
                    live[name].copy_(opened.get_tensor(name))
