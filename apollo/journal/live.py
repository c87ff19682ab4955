"""The live weights as the words that a journal commits: copied while the trainer stands still.

live tensors (shared memory of a CPU, or CUDA) --copy--> buffers of this process --> words by name
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from apollo.journal.codec import Words
from apollo.weights import memory
from apollo.weights.layout import WeightLayout

_INTEGERS = {2: torch.int16, 4: torch.int32}
_UNSIGNED = {2: "uint16", 4: "uint32"}


class Staging:
    """Memory for one copy of all weights; its pages are touched before anybody waits for them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._copies = {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for name, tensor in tensors.items()
        }

    def copy(self) -> None:
        """Take over what the tensors hold now; the caller keeps them still meanwhile."""
        for name, tensor in self._tensors.items():
            self._copies[name].copy_(tensor)

    def words(self) -> dict[str, Words]:
        """The bits of each copied tensor, in the order of its elements."""
        return {
            name: copy.reshape(-1)
            .view(_INTEGERS[copy.itemsize])
            .numpy()
            .view(_UNSIGNED[copy.itemsize])
            for name, copy in self._copies.items()
        }


def restore(layout_path: Path, directory: Path) -> None:
    """Write a model directory's values into the live tensors of the same names, in place."""
    live = memory.Mapping(WeightLayout.load(layout_path), is_writable=True).tensors()
    with torch.no_grad():
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as opened:
                for name in list(opened.keys()):
                    live[name].copy_(opened.get_tensor(name))
