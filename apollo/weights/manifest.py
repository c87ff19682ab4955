"""`reverie.json`: says that a model directory is complete, and which weights it holds.

It is written last, after everything it names is on disk: a directory without it was interrupted.
Adoption and the checkpoint actor write it; nobody edits it in place.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

FORMAT: Final = 1
FILE_NAME: Final = "reverie.json"


class ManifestError(ValueError):
    """The manifest is damaged, or of a format that this version does not know."""


@dataclass(frozen=True)
class Manifest:
    """What one complete model directory holds."""

    base: str
    """The model as it was asked for: an absolute path, a hub id or an alias."""
    dtype: str
    """Type of (most of) the weights, as config.json spells it."""
    files: dict[str, int]
    """Size in bytes of every other file of the directory, by name."""
    generation: int = 0
    weights_version: int = 0
    root: str = ""
    """Names the exact weights, see `journal.image`; empty until a journal has hashed them."""
    created: float = field(default_factory=time.time)

    def is_met_by(self, directory: Path) -> bool:
        """Whether every file is there in its full size; further files do no harm."""
        return self.files.items() <= sizes(directory).items()


def sizes(directory: Path) -> dict[str, int]:
    """Size of every regular file of `directory` but the manifest, by name."""
    return {
        entry.name: entry.stat().st_size
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name)
        if entry.is_file() and entry.name != FILE_NAME
    }


def read(directory: Path) -> Manifest | None:
    """The manifest of `directory`, or None if there is none; raises ManifestError."""
    path = directory / FILE_NAME
    try:
        return decode(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None


def decode(data: bytes, path: str) -> Manifest:
    """What `encode` made; raises ManifestError, which names `path`."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise ManifestError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise ManifestError(f"{path} has format {found!r}; this version of Reverie reads {FORMAT}")
    del record["format"]
    record.setdefault("root", "")
    if set(record) != {part.name for part in fields(Manifest)}:
        raise ManifestError(f"{path} is damaged: its keys are {', '.join(sorted(record))}")
    return Manifest(**record)


def encode(manifest: Manifest) -> bytes:
    """The manifest as the bytes of its file."""
    return (json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2) + "\n").encode()


def require(directory: Path) -> Manifest:
    """The manifest of a directory that must have one; raises ManifestError."""
    found = read(directory)
    if found is None:
        raise ManifestError(f"{directory} has no {FILE_NAME}: it is not a complete adopted model")
    return found


def write(directory: Path, manifest: Manifest) -> None:
    """Put the manifest into `directory`, durably, as the last of its files.

    Blocks on fsync of the file and of the directory. The files that it names must be on disk.
    """
    draft = directory / f".{FILE_NAME}.draft"
    with draft.open("wb") as file:
        file.write(encode(manifest))
        file.flush()
        os.fsync(file.fileno())
    draft.rename(directory / FILE_NAME)
    sync_directory(directory)


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it, if it is not there; their names are durable then."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    # Also of those that were there: whoever was killed may have made them in memory only.
    for each in dict.fromkeys((directory, directory.parent, *missing)):
        sync_directory(each.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
