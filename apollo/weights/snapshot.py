"""Writes the live weights as a complete model directory and swaps it in atomically.

    live tensors + public directory -> hidden directory (same files, same tensor names), fsync
        -> read back with stock safetensors, compared bit for bit -> renameat2(RENAME_EXCHANGE)

At every instant the public path names one complete directory. Owns no policy: who calls, when, and
what is held meanwhile is the checkpoint actor's business.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from apollo.weights.adopt import copy_file

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class SnapshotError(RuntimeError):
    """The hidden directory is not fit to be published; the public one is untouched."""


def write_weights(tensors: Mapping[str, torch.Tensor], public: Path, hidden: Path) -> int:
    """Write every safetensors file of `public` into `hidden` with the live values; bytes written.

    The caller holds the weights still. Raises OSError or SnapshotError on a full disk, and
    SnapshotError for a tensor of the public directory that is not live.
    """
    written = 0
    for source in sorted(public.glob("*.safetensors")):
        with safe_open(source, framework="pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata()
        missing = [name for name in names if name not in tensors]
        if missing:
            raise SnapshotError(f"{missing[0]}: is published but not among the live weights")
        target = hidden / source.name
        values = {name: tensors[name].contiguous() for name in names}
        try:
            save_file(values, target, metadata=metadata)
        except SafetensorError as error:  # Not an OSError, even when the disk is full.
            raise SnapshotError(f"{source.name} could not be written: {error}") from None
        sync(target)
        written += target.stat().st_size
    return written


def verify_weights(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Read a directory as a stock loader would; raises SnapshotError at the first differing bit."""
    left = set(tensors)
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as opened:
                for name in list(opened.keys()):
                    if name not in left:
                        raise SnapshotError(f"{name}: is not live, or is in two files")
                    if not torch.equal(
                        _bytes(opened.get_tensor(name)), _bytes(tensors[name].cpu())
                    ):
                        raise SnapshotError(f"{name}: reads back differently from what was written")
                    left.discard(name)
        except SafetensorError as error:
            raise SnapshotError(f"{path.name} cannot be read back: {error}") from None
    if left:
        raise SnapshotError(f"{min(left)}: is live but in no file of the directory")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def copy_rest(public: Path, hidden: Path, excluded: Iterable[str]) -> None:
    """Copy what is not weights (configuration, tokenizer, template) and make it durable."""
    for source in sorted(public.iterdir()):
        if source.is_file() and source.suffix != ".safetensors" and source.name not in excluded:
            copy_file(source, hidden / source.name)
            sync(hidden / source.name)
    sync(hidden)


def exchange(hidden: Path, public: Path) -> None:
    """Swap two directories in one atomic step and make the swap durable.

    Raises SnapshotError where the file system cannot (NFS, a mount point).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.renameat2(
        _AT_FDCWD, os.fsencode(hidden), _AT_FDCWD, os.fsencode(public), _RENAME_EXCHANGE
    )
    if result != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EBUSY):
            raise SnapshotError(
                f"this file system cannot exchange directories ({os.strerror(code)}); "
                "put REVERIE_HOME on ext4, xfs, btrfs or tmpfs"
            )
        raise OSError(code, os.strerror(code))
    sync(public.parent)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def empty_directory(path: Path) -> None:
    """Make `path` an empty directory, whatever a crash left there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o755)
