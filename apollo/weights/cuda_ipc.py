"""Exports and opens CUDA memory through torch's IPC handles, one block per parameter storage.

The exporter must outlive every importer. Memory of the expandable-segments allocator and of sleep
mode cannot be exported; `loader.py` refuses both before anything is allocated.
"""

import json
from collections.abc import Mapping

import torch

from apollo.weights.layout import Block, LayoutError
from apollo.weights.record import Span


def export(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[Block, ...], tuple[Span, ...]]:
    """One block per distinct storage; handles are JSON lists of numbers and hex strings."""
    blocks: list[Block] = []
    spans: list[Span] = []
    of_storage: dict[int, int] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_storage:
            try:
                shared = storage._share_cuda_()
            except RuntimeError as error:
                raise LayoutError(f"{name}: its memory cannot be exported: {error}") from None
            handle = [part.hex() if isinstance(part, bytes) else part for part in shared]
            of_storage[storage.data_ptr()] = len(blocks)
            blocks.append(Block(json.dumps(handle), storage.nbytes()))
        spans.append(
            Span(
                name,
                of_storage[storage.data_ptr()],
                tensor.data_ptr(),
                tensor.numel() * tensor.element_size(),
                tensor.data_ptr() - storage.data_ptr(),
            )
        )
    return tuple(blocks), tuple(spans)


def open_block(block: Block) -> torch.Tensor:
    """A uint8 CUDA tensor over a block that another process exported."""
    torch.cuda._lazy_init()
    device, handle, size, offset, counter, counter_offset, event, sync = json.loads(block.handle)
    storage = torch.UntypedStorage._new_shared_cuda(
        device,
        bytes.fromhex(handle),
        size,
        offset,
        bytes.fromhex(counter),
        counter_offset,
        bytes.fromhex(event),
        sync,
    )
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)
