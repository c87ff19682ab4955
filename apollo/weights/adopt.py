"""Adoption: a complete copy of a model under REVERIE_HOME, which is what gets taught.

    wheel, directory or hub id --> models/.NAME.adopting --fsync, reverie.json last--> models/NAME

The original is only read. What cannot be taught is refused before a byte is copied. Imports no
torch, so that a command line can adopt a model that is already there in milliseconds.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from apollo.weights import manifest, smollm2
from apollo.weights.convert import convert_file
from apollo.weights.manifest import Manifest, ManifestError
from apollo.weights.model_directory import (
    INDEX,
    SIDE_FILES,
    AdoptionError,
    check_directory,
    has_chat_template,
    main_dtype,
    nested_configs,
    read_json,
    read_weights,
    side_files,
    weight_files,
)

__all__ = ["DTYPES", "Adopted", "AdoptionError", "adopt", "copy_file", "model_name"]

Progress = Callable[[str], None]

DTYPES: Final = ("float32", "bfloat16")
"""Types that weights can be adopted in."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LOCK_TIMEOUT_S: Final = 3600  # as long as a large model may take to download
_FICLONE: Final = 0x40049409  # linux/fs.h: share the source's blocks, copy on write


@dataclass(frozen=True)
class Adopted:
    """A complete model directory under REVERIE_HOME."""

    name: str
    directory: Path
    num_tensors: int
    size_bytes: int
    """Bytes of the weights."""


def adopt(model: str, home: Path, dtype: str | None, progress: Progress) -> Adopted:
    """Put a complete copy of `model` at `home`/models/NAME, or find it there.

    `model` is the alias of the default model, a directory or a hub id; `dtype` is "float32",
    "bfloat16", or None to keep the model's own. Blocks for a download, a conversion or a copy the
    first time; a second call returns at once. Raises AdoptionError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise AdoptionError(f"dtype={dtype!r} is unknown; use {' or '.join(DTYPES)}")
    models = home.expanduser().resolve() / "models"
    name, base, source = _resolve(model, models)
    directory = models / name
    manifest.make_directory(models)
    with _lock(models / f".{name}.lock", progress):
        if not _is_complete(directory, base, dtype):
            _build(directory, base, source, dtype, progress)
        return _describe(name, directory)


def model_name(model: str, home: Path) -> str:
    """The name under which `model` is, or would be, adopted; raises AdoptionError."""
    return _resolve(model, home.expanduser().resolve() / "models")[0]


def _resolve(model: str, models: Path) -> tuple[str, str, Path | None]:
    """Name, what the model is recorded as, and its directory if it is one."""
    base, source = _locate(model)
    if source is not None and source.parent == models:
        base, source = _locate(_base_of(source))
    return _name_of(source.name if source is not None else base), base, source


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content (a link's target), sharing disk blocks where the file system can.

    The new file belongs to the target alone: writing to it never reaches the source.
    """
    with source.open("rb") as read, target.open("xb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
            return
        except OSError:
            pass  # another file system, or one that cannot share
    shutil.copyfile(source, target)


# Names and places.


def _locate(model: str) -> tuple[str, Path | None]:
    """What the model is recorded as, and its directory if it is one."""
    if model == smollm2.ALIAS:
        return model, None
    path = Path(model).expanduser()
    if model and (path.exists() or path.is_absolute() or model.startswith(".")):
        path = path.resolve()
        return str(path), path
    if _HUB_ID.fullmatch(model):
        return model, None
    raise AdoptionError(
        f"model={model!r} is neither a directory, nor a hub id (org/name), nor {smollm2.ALIAS!r}"
    )


def _name_of(base: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", base.rpartition("/")[2]).strip(".-")
    if not name:
        raise AdoptionError(f"model={base!r} leaves no name for the copy; rename the directory")
    return name


def _base_of(directory: Path) -> str:
    found = _read_manifest(directory)
    if found is None:
        raise AdoptionError(f"{directory} is no complete model; name the model it was copied from")
    return found.base


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """One adoption of a name at a time; another process waits for the first one's copy."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    is_told = False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise AdoptionError(f"another process has held {path} for too long") from None
            if not is_told:
                progress("waiting for another process that adopts this model")
                is_told = True
            time.sleep(0.2)
        yield


# What is there already.


def _read_manifest(directory: Path) -> Manifest | None:
    try:
        return manifest.read(directory)
    except ManifestError as error:
        raise AdoptionError(
            f"{error}. If nothing learned in {directory} is needed, remove it and start again"
        ) from None


def _is_complete(directory: Path, base: str, dtype: str | None) -> bool:
    """Whether `directory` can be used as it is; False if it is absent or half-made."""
    found = _read_manifest(directory)
    if found is None:
        return False
    if found.base != base:
        raise AdoptionError(
            f"{directory} already holds {found.base}, not {base}; copy the model to a directory of "
            f"another name, or set REVERIE_HOME to another place, or remove {directory}"
        )
    if not found.is_met_by(directory):
        if found.generation == 0:
            return False
        raise AdoptionError(
            f"{directory} is damaged: its files are not those of generation {found.generation}; "
            "restore it from a backup, or remove it to start again from the original"
        )
    if dtype is not None and found.dtype != dtype:
        raise AdoptionError(
            f"{directory} holds {found.dtype}, not {dtype}; set dtype={found.dtype}, or set "
            f"REVERIE_HOME to another place, or remove {directory} (what it learned is lost)"
        )
    return True


def _describe(name: str, directory: Path) -> Adopted:
    headers = read_weights(weight_files(directory))
    size_bytes = sum(header.size_bytes for header in headers.values())
    return Adopted(name, directory, len(headers), size_bytes)


# Making it.


def _build(
    directory: Path, base: str, source: Path | None, dtype: str | None, progress: Progress
) -> None:
    hidden = directory.with_name(f".{directory.name}.adopting")
    _remove(hidden)
    hidden.mkdir()
    try:
        if base == smollm2.ALIAS:
            _build_default(hidden, dtype or "float32", progress)
        else:
            _build_copy(hidden, source or _download(base, progress), dtype, progress)
        _finish(hidden, base)
        # Only a directory without a manifest, or with a damaged untaught model, comes this far.
        _remove(directory)
        hidden.rename(directory)
        manifest.sync_directory(directory.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AdoptionError(
                f"{directory.parent} has no room for {base}; free some space, or set REVERIE_HOME"
            ) from None
        raise
    finally:
        _remove(hidden)


def _build_default(hidden: Path, dtype: str, progress: Progress) -> None:
    try:
        smollm2.build(hidden, dtype, progress)
    except smollm2.DefaultModelError as error:
        raise AdoptionError(f"{smollm2.ALIAS}: {error}") from None
    num_tensors = len(read_weights(weight_files(hidden)))
    if num_tensors != smollm2.NUM_TENSORS:
        raise AdoptionError(
            f"{smollm2.ALIAS}: {num_tensors} tensors came out of the conversion, not "
            f"{smollm2.NUM_TENSORS}; install the versions of requirements-cpu.lock"
        )


def _build_copy(hidden: Path, source: Path, dtype: str | None, progress: Progress) -> None:
    weights = check_directory(source)
    headers = read_weights(weights)
    own_dtype = main_dtype(headers)
    for number, path in enumerate(weights, 1):
        progress(f"copying {path.name} ({number} of {len(weights)})")
        if dtype in (None, own_dtype):
            copy_file(path, hidden / path.name)
        else:
            convert_file(path, hidden / path.name, dtype or own_dtype)
    for path in side_files(source):
        copy_file(path, hidden / path.name)
    if not has_chat_template(hidden):
        progress("this model has no chat template: /v1/completions works, chat does not")
    _state_dtype(hidden, dtype or own_dtype)


def _state_dtype(directory: Path, dtype: str) -> None:
    """Let config.json and the index say what the copied weights are."""
    path = directory / "config.json"
    config = read_json(path)
    stated = json.dumps(config)
    for part in (config, *nested_configs(config)):
        part["torch_dtype" if "torch_dtype" in part else "dtype"] = dtype
        if "torch_dtype" in part and "dtype" in part:
            part["dtype"] = dtype
    if json.dumps(config) != stated:
        path.write_text(json.dumps(config, indent=2) + "\n")
    index = directory / INDEX
    if index.is_file():
        record = read_json(index)
        headers = read_weights(weight_files(directory))
        total = sum(header.size_bytes for header in headers.values())
        record["metadata"] = {**(record.get("metadata") or {}), "total_size": total}
        index.write_text(json.dumps(record, indent=2) + "\n")


def _finish(hidden: Path, base: str) -> None:
    """Check what was written, make it durable, and say last that it is complete."""
    headers = read_weights(weight_files(hidden))
    for entry in os.scandir(hidden):
        with open(entry.path, "rb") as file:
            os.fsync(file.fileno())
    made = Manifest(base=base, dtype=main_dtype(headers), files=manifest.sizes(hidden))
    manifest.write(hidden, made)


def _remove(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


def _download(base: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"downloading {base}")
    try:
        patterns = ["*.safetensors", *SIDE_FILES]
        return Path(snapshot_download(base, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = str(error).strip().splitlines()[0]
        raise AdoptionError(
            f"{base} could not be downloaded: {reason}. Check the name and the network (and "
            "HF_TOKEN for a gated model), or give a local directory"
        ) from None
