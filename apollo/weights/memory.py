"""Shares weight memory between processes: a POSIX shared-memory file on a CPU, CUDA IPC on a GPU.

`place` moves a fresh model's parameters into exportable memory before anything is loaded into them,
`Mapping` opens the same memory elsewhere and hands out tensors.

    engine process                               trainer process
    parameter.data -> block 0 (file, MAP_SHARED) <- Mapping.tensor(view)
"""

import mmap
import os
import warnings
from pathlib import Path
from typing import Final

import torch
from torch import nn

from apollo.weights import cuda_ipc
from apollo.weights.layout import DTYPES, Block, LayoutError, TensorView, WeightLayout
from apollo.weights.record import Span

ALIGNMENT: Final = 256
"""Every parameter starts at a multiple of this: enough for any vector load, CPU or GPU."""


def place(model: nn.Module, path: Path) -> tuple[tuple[Block, ...], tuple[Span, ...]]:
    """Move every parameter of `model` into exportable memory; buffers stay where they are.

    On a CPU the memory is the new file `path` (mode 0600, fully reserved, so that a full
    shared-memory file system is an error here and not a SIGBUS later). On a GPU the parameters stay
    where they are and their allocations are exported. Contents are not kept on a CPU.
    Raises LayoutError with the tensor's name for memory that cannot be shared.
    """
    tensors = _distinct(model)
    devices = {tensor.device.type for tensor in tensors.values()}
    if devices == {"cuda"}:
        return cuda_ipc.export(tensors)
    if devices != {"cpu"}:
        raise LayoutError(f"{next(iter(tensors), 'model')}: weights on {sorted(devices)}")

    offsets, size_bytes = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = size_bytes
        size_bytes += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    block = _create(path, size_bytes)
    memory = torch.from_file(str(path), shared=True, size=size_bytes, dtype=torch.uint8)
    spans = []
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        piece = memory[offsets[name] : offsets[name] + num_bytes].view(tensor.dtype)
        tensor.data = piece.view(tensor.shape)
        spans.append(Span(name, 0, tensor.data_ptr(), num_bytes, offsets[name]))
    return (block,), tuple(spans)


def _distinct(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by their first name; a tied one appears once."""
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.numel()}
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise LayoutError(f"{name}: is not contiguous in the engine and cannot be shared")
        if not tensor.is_meta and owners.setdefault(tensor.data_ptr(), name) != name:
            raise LayoutError(
                f"{name}: lies in the memory of {owners[tensor.data_ptr()]} but is another "
                "parameter; moving both would part them"
            )
    return dict(tensors)


def _create(path: Path, size_bytes: int) -> Block:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        path.unlink()
        free = os.statvfs(path.parent)
        raise LayoutError(
            f"{path.name}: {size_bytes / 2**20:.0f} MiB of shared memory are needed but only "
            f"{free.f_bavail * free.f_frsize / 2**20:.0f} MiB are free on {path.parent.parent} "
            f"({error.strerror}); in a container, raise --shm-size"
        ) from None
    finally:
        os.close(descriptor)
    return Block(str(path), size_bytes)


class Mapping:
    """The weight memory of a layout, opened in this process; read-only unless `is_writable`.

    Every tensor handed out keeps the memory mapped. A read-only mapping faults on a store.
    """

    def __init__(self, layout: WeightLayout, *, is_writable: bool) -> None:
        self._layout = layout
        device = layout.device
        self._blocks = [open_block(each, device, is_writable=is_writable) for each in layout.blocks]

    def tensor(self, view: TensorView) -> torch.Tensor:
        """The live tensor that `view` describes; shape and stride are the view's."""
        dtype = DTYPES[view.dtype]
        storage = self._blocks[view.block].untyped_storage()
        # Not a view of one big tensor: such views share autograd's version counter, and a write to
        # one parameter during backward would invalidate all the others.
        empty = torch.empty(0, dtype=dtype, device=storage.device)
        offset = view.offset_bytes // dtype.itemsize
        return empty.set_(storage, offset, view.shape, view.stride)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, by checkpoint name."""
        return {view.name: self.tensor(view) for view in self._layout}


def make_block(size_bytes: int, path: Path, device: torch.device) -> tuple[torch.Tensor, Block]:
    """Zeros, uint8, that other processes can open: on a CPU the new file `path`, as in `place`."""
    if device.type == "cuda":
        memory = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
        return memory, cuda_ipc.export({path.name: memory})[0][0]
    block = _create(path, size_bytes)
    return torch.from_file(str(path), shared=True, size=size_bytes, dtype=torch.uint8), block


def open_block(block: Block, device: str, *, is_writable: bool) -> torch.Tensor:
    """A uint8 tensor over a block that another process has made; nothing hinders a write on CUDA.

    Of a file, safetensors and torch treat it like any other memory.
    """
    if device == "cuda":
        return cuda_ipc.open_block(block)
    descriptor = os.open(block.handle, os.O_RDWR if is_writable else os.O_RDONLY)
    try:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        memory = mmap.mmap(descriptor, block.size_bytes, mmap.MAP_SHARED, protection)
    finally:
        os.close(descriptor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)
