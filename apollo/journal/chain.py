"""The manifest: which generations there are, in order, and the file that holds each.

    manifest-00000007.json --names, with size and hash--> base-*.rvj, *-*.rvj, optimizer-*

A manifest is written to a draft, synced and renamed, so it is whole or absent; it carries its own
hash all the same. The newest whole one counts. Each is written twice, under two numbers, so that
a damaged one loses nothing.
"""

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Final, Literal, Self

from blake3 import blake3

from apollo.journal.disk import Disk, DiskFailed, DiskFull

FORMAT: Final = 1
KEPT_MANIFESTS: Final = 2
_NAME: Final = re.compile(r"manifest-(\d{8})\.json")

Kind = Literal["base", "commit", "rollback"]


class ChainError(ValueError):
    """The manifest is damaged."""


class UnknownFormat(Exception):
    """The manifest is whole, and of a format that this version does not know; it is left alone."""


@dataclass(frozen=True)
class StoredFile:
    """A file of the journal, as it was written."""

    name: str
    size: int
    hash: str
    """BLAKE3 in hexadecimal: of a segment, all before its last 32 bytes; else of the whole file."""

    def holds(self, data: bytes) -> bool:
        """Whether `data` is the whole file as it was written; of a segment, see `segment.check`."""
        return blake3(data).hexdigest() == self.hash


@dataclass(frozen=True)
class Generation:
    """One committed state of the weights, and what is durable together with it."""

    generation: int
    kind: Kind
    parent: int | None
    """The generation that its deltas lead from; None for a base."""
    weights_version: int
    """Steps of the versions after the parent's, up to this one, were learned in it."""
    created: float
    root: str
    """Hash of its table of chunk hashes: equal roots, equal weights."""
    segment: StoredFile
    num_changed: int
    """Chunks that differ from the parent's."""
    optimizer: StoredFile | None = None
    step: int = 0
    """Steps that the optimizer had made."""
    returns_to: int | None = None
    """Of a rollback: the generation whose weights these are."""
    undone_after: int | None = None
    """Of a rollback: the version of those weights; all steps from there to here are undone."""
    is_learned_again: bool = False
    """Of a rollback: what was undone is queued again, except `forgotten`."""
    forgotten: tuple[str, ...] = ()
    """Of a rollback: ids of samples that must never be learned again."""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Read what `asdict` made; raises UnknownFormat."""
        if set(record) != {part.name for part in fields(cls)}:
            raise UnknownFormat(f"a generation has the keys {', '.join(sorted(record))}")
        optimizer = record["optimizer"]
        return cls(
            **record
            | {
                "segment": StoredFile(**record["segment"]),
                "optimizer": None if optimizer is None else StoredFile(**optimizer),
                "forgotten": tuple(record["forgotten"]),
            }
        )


@dataclass(frozen=True)
class Chain:
    """All generations that can be returned to, oldest first; each one's parent is before it."""

    sequence: int
    chunk_words: int
    headers: str
    """`Image.headers_hash` of every directory of this model."""
    generations: tuple[Generation, ...]

    @property
    def newest(self) -> Generation:
        return self.generations[-1]

    def find(self, generation: int) -> Generation | None:
        return next((g for g in self.generations if g.generation == generation), None)

    def next(self, generations: tuple[Generation, ...]) -> Self:
        """The manifest that follows this one."""
        return replace(self, sequence=self.sequence + 1, generations=generations)

    def files(self) -> set[str]:
        """Names of all files that the manifest needs."""
        stored = [g.segment for g in self.generations]
        stored += [g.optimizer for g in self.generations if g.optimizer is not None]
        return {file.name for file in stored}

    def encode(self) -> bytes:
        body = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return json.dumps({"hash": _hash(body), "body": body}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises ChainError unless every bit is as it was written and the parents are in order.

        Raises UnknownFormat for one that is whole and that this version cannot read.
        """
        try:
            envelope = json.loads(data)
            if not _has_hash(envelope["body"], envelope["hash"]):
                raise ChainError("its hash does not match")
            record = json.loads(envelope["body"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ChainError(f"it is damaged: {error}") from None
        if record.pop("format", None) != FORMAT:
            raise UnknownFormat(
                "the journal was written by another version of Reverie; use that one, or move "
                "REVERIE_HOME/state/NAME/journal away to keep only what is public"
            )
        generations = tuple(Generation.from_record(each) for each in record.pop("generations"))
        if not generations or generations[0].parent is not None:
            raise ChainError("it does not begin with a base")
        for before, after in pairwise(generations):
            if after.parent != before.generation or after.generation <= before.generation:
                raise ChainError(f"generation {after.generation} does not follow its parent")
        return cls(generations=generations, **record)


def _has_hash(body: str, expected: str) -> bool:
    return _hash(body) == expected


def _hash(body: str) -> str:
    return blake3(body.encode()).hexdigest()


def manifest_name(sequence: int) -> str:
    return f"manifest-{sequence:08d}.json"


def sequences(disk: Disk, folder: str) -> list[int]:
    """Numbers of the manifests in `folder`, newest first, whole or not."""
    found = [_NAME.fullmatch(name) for name in disk.names(folder)]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read_newest(disk: Disk, folder: str) -> tuple[Chain | None, list[str]]:
    """The newest whole manifest, and the names of newer ones that are damaged."""
    damaged: list[str] = []
    for sequence in sequences(disk, folder):
        name = manifest_name(sequence)
        try:
            return Chain.decode(disk.read(f"{folder}/{name}")), damaged
        except (ChainError, DiskFailed):
            damaged.append(name)
    return None, damaged


def has_twin(disk: Disk, folder: str, chain: Chain) -> bool:
    """Whether the manifest before the newest, `chain`, is whole and says the same."""
    try:
        before = Chain.decode(disk.read(f"{folder}/{manifest_name(chain.sequence - 1)}"))
    except (FileNotFoundError, ChainError, DiskFailed):
        return False
    return before.next(before.generations) == chain


def write(disk: Disk, folder: str, chain: Chain) -> Chain:
    """Make `chain` the newest manifest, and its twin the one after it; the latter is returned.

    Its files must be on disk. Durable when it returns. Raises DiskFull with nothing changed; where
    there is room for one only, that one counts.
    """
    _put(disk, f"{folder}/{manifest_name(chain.sequence)}", chain.encode())
    with suppress(DiskFull):
        twin = chain.next(chain.generations)
        _put(disk, f"{folder}/{manifest_name(twin.sequence)}", twin.encode())
        chain = twin
    disk.sync(folder)
    return chain


def replace_file(disk: Disk, path: str, data: bytes) -> None:
    """Put a small file in place, whole or not at all; durable when it returns."""
    _put(disk, path, data)
    disk.sync(path.rpartition("/")[0])


def _put(disk: Disk, path: str, data: bytes) -> None:
    """The same, but its name is not durable yet."""
    draft = f"{path}.draft"
    folder, _, name = draft.rpartition("/")
    if name in disk.names(folder):
        disk.remove(draft)
    disk.create(draft, len(data))
    disk.write(draft, 0, data)
    disk.sync(draft)
    disk.rename(draft, path)
