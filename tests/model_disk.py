"""A model of a file system that forgets what was not synced: ALICE (Pillai et al., OSDI 2014).

    workload --operations--> ModelDisk --records--> writes, names, syncs
                                                       |  power fails before a sync
    image: all that was synced, and any subset of the rest <--+

Nothing orders two operations but a sync: a write without one may be lost, wholly or by halves, and
a name without a sync of its directory may be lost, come before its file's bytes, or come alone.
"""

import errno
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random
from typing import Any

from apollo.journal.disk import DiskError

ROOT = 0


@dataclass
class Image:
    """A disk after a crash: what a machine that starts again finds."""

    files: dict[str, bytes]
    directories: frozenset[str]

    def digest(self) -> bytes:
        """Equal for equal disks."""
        hashed = blake2b(digest_size=12)
        for path in sorted(self.directories):
            hashed.update(f"{path}/\n".encode())
        for path, data in sorted(self.files.items()):
            hashed.update(f"{path} {len(data)}\n".encode() + data)
        return hashed.digest()


@dataclass(frozen=True)
class Write:
    """Bytes of a file; `data` None means a new size."""

    node: int
    offset: int
    data: bytes | None


@dataclass(frozen=True)
class Names:
    """One atomic change of names: each (directory, name) gets a node, or None."""

    directories: tuple[int, ...]
    changes: tuple[tuple[int, str, int | None], ...]
    is_exchange: bool = False


@dataclass(frozen=True)
class Sync:
    """Of a file's bytes or a directory's names."""

    node: int


@dataclass(frozen=True)
class Mark:
    """Something that the workload says: it changes nothing."""

    what: Any


Operation = Write | Names | Sync | Mark


class Killed(BaseException):
    """The process was killed: nothing catches this, and what is not synced stays so."""


@dataclass
class ModelDisk:
    """`Disk` in memory, over an image; keeps all operations since."""

    image: Image
    can_exchange: bool = True
    log: list[Operation] = field(default_factory=list)
    is_mortal: Callable[[str, str], bool] | None = None
    """Asked before each change, with its name and path, whether the process is killed there."""

    def __post_init__(self) -> None:
        self.files: dict[int, bytearray] = {}
        self.tree: dict[int, dict[str, int]] = {ROOT: {}}
        self._numbers = itertools.count(1)
        for path in sorted(self.image.directories):
            self._put(path, None)
        for path, data in self.image.files.items():
            self._put(path, data)
        self.first_files = {node: bytes(data) for node, data in self.files.items()}
        self.first_tree = {node: dict(names) for node, names in self.tree.items()}

    def _put(self, path: str, data: bytes | None) -> None:
        parent, name = self._place(path)
        node = next(self._numbers)
        self.tree[parent][name] = node
        if data is None:
            self.tree[node] = {}
        else:
            self.files[node] = bytearray(data)

    def mark(self, what: Any) -> None:
        """Note where the workload is."""
        self.log.append(Mark(what))

    # Finding nodes.

    def _place(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        return (self._node(folder) if folder else ROOT), name

    def _node(self, path: str) -> int:
        node = ROOT
        for name in path.split("/"):
            if node not in self.tree or name not in self.tree[node]:
                raise FileNotFoundError(path)
            node = self.tree[node][name]
        return node

    def _file(self, path: str) -> bytearray:
        node = self._node(path)
        if node not in self.files:
            raise DiskError(f"{path} is a directory")
        return self.files[node]

    # Disk: reading.

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        data = self._file(path)
        return bytes(data[offset:] if size is None else data[offset : offset + size])

    def size(self, path: str) -> int:
        return len(self._file(path))

    def names(self, directory: str) -> list[str]:
        try:
            return sorted(self.tree[self._node(directory)])
        except FileNotFoundError:
            return []

    def is_directory(self, path: str) -> bool:
        try:
            return self._node(path) in self.tree
        except FileNotFoundError:
            return False

    def is_leased(self, directory: str) -> bool:
        return False

    # Disk: changing.

    def _live(self, change: str, path: str) -> None:
        if self.is_mortal is not None and self.is_mortal(change, path):
            self.is_mortal = lambda change, path: True
            raise Killed(f"{change} {path}")

    def create(self, path: str, size: int = 0) -> None:
        self._live("create", path)
        node = self._add(path)
        self.files[node] = bytearray(size)
        if size:
            self.log.append(Write(node, size, None))

    def make_directory(self, path: str) -> None:
        self._live("make_directory", path)
        self.tree[self._add(path)] = {}

    def _add(self, path: str) -> int:
        parent, name = self._place(path)
        if name in self.tree[parent]:
            raise FileExistsError(path)
        node = next(self._numbers)
        self._change((parent, name, node))
        return node

    def write(self, path: str, offset: int, data: bytes | memoryview) -> None:
        self._live("write", path)
        node, new = self._node(path), bytes(data)
        old = self.files[node]
        if len(old) < offset + len(new):
            old.extend(bytes(offset + len(new) - len(old)))
        old[offset : offset + len(new)] = new
        half = (len(new) + 1) // 2
        for at in range(0, len(new), max(half, 1)):
            self.log.append(Write(node, offset + at, new[at : at + half]))

    def sync(self, path: str) -> None:
        self._live("sync", path)
        self.log.append(Sync(self._node(path)))

    def rename(self, old: str, new: str) -> None:
        self._live("rename", old)
        (one, name), (two, other) = self._place(old), self._place(new)
        node = self._node(old)
        if self.tree.get(self.tree[two].get(other, -1)):
            raise DiskError(f"{new} is a directory that is not empty")
        self._change((one, name, None), (two, other, node))

    def exchange(self, first: str, second: str) -> None:
        if not self.can_exchange:
            raise OSError(errno.EXDEV, "cannot exchange")
        self._live("exchange", first)
        (one, name), (two, other) = self._place(first), self._place(second)
        here, there = self._node(first), self._node(second)
        self._change((one, name, there), (two, other, here), is_exchange=True)

    def remove(self, path: str) -> None:
        self._live("remove", path)
        parent, name = self._place(path)
        if self.tree.get(self._node(path)):
            raise DiskError(f"{path} is not empty")
        self._change((parent, name, None))

    def _change(self, *changes: tuple[int, str, int | None], is_exchange: bool = False) -> None:
        operation = Names(tuple({parent for parent, _, _ in changes}), changes, is_exchange)
        _apply_names(self.tree, operation)
        self.log.append(operation)


def _apply_names(tree: dict[int, dict[str, int]], operation: Names) -> None:
    if operation.is_exchange and any(name not in tree[d] for d, name, _ in operation.changes):
        return  # What it would have swapped was lost itself.
    for directory, name, node in operation.changes:
        if node is None:
            tree[directory].pop(name, None)
        else:
            tree[directory][name] = node


def whole_image(disk: ModelDisk) -> Image:
    """The disk as it is, everything synced."""
    return _image(disk, disk.log)


def _image(disk: ModelDisk, kept: Sequence[Operation]) -> Image:
    files = {node: bytearray(data) for node, data in disk.first_files.items()}
    tree = {node: dict(names) for node, names in disk.first_tree.items()}
    for node in disk.tree:
        tree.setdefault(node, {})
    for operation in kept:
        if isinstance(operation, Write):
            data = files.setdefault(operation.node, bytearray())
            end = operation.offset + len(operation.data or b"")
            if len(data) < end:
                data.extend(bytes(end - len(data)))
            if operation.data is not None:
                data[operation.offset : end] = operation.data
        elif isinstance(operation, Names):
            _apply_names(tree, operation)
    found: dict[str, bytes] = {}
    directories: set[str] = set()

    def walk(node: int, path: str) -> None:
        for name, child in tree[node].items():
            where = f"{path}{name}"
            if child in disk.tree:
                directories.add(where)
                walk(child, f"{where}/")
            else:
                found[where] = bytes(files.get(child, b""))

    walk(ROOT, "")
    return Image(found, frozenset(directories))


@dataclass(frozen=True)
class Crash:
    """A crash, and where in the workload it was."""

    image: Image
    marks: tuple[Any, ...]


def crashes(disk: ModelDisk, per_window: int, seed: int) -> Iterator[Crash]:
    """Images that a loss of power may leave: before each sync, and at the end.

    Any subset of what is pending may have reached the disk. Where there are more than `per_window`
    subsets, so many are drawn, those that lose or keep one operation alone among them.
    """
    random = Random(seed)
    ends = [at for at, each in enumerate(disk.log) if isinstance(each, Sync)] + [len(disk.log)]
    for end in ends:
        past = disk.log[:end]
        is_durable = _durable(past)
        pending = [
            at
            for at, each in enumerate(past)
            if isinstance(each, Write | Names) and not is_durable[at]
        ]
        marks = tuple(each.what for each in past if isinstance(each, Mark))
        for lost in _subsets(pending, per_window, random):
            yield Crash(_image(disk, [o for at, o in enumerate(past) if at not in lost]), marks)


def _durable(past: Sequence[Operation]) -> list[bool]:
    """Of each operation, whether a later sync has made it durable."""
    synced: set[int] = set()
    found = [False] * len(past)
    for at in range(len(past) - 1, -1, -1):
        each = past[at]
        if isinstance(each, Sync):
            synced.add(each.node)
        elif isinstance(each, Write):
            found[at] = each.node in synced
        elif isinstance(each, Names):
            found[at] = all(directory in synced for directory in each.directories)
    return found


def _subsets(pending: list[int], limit: int, random: Random) -> Iterator[set[int]]:
    if 2 ** len(pending) <= limit:
        for size in range(len(pending) + 1):
            for some in itertools.combinations(pending, size):
                yield set(some)
        return
    alone = [{at} for at in pending]
    fixed = [set(), set(pending), *alone, *(set(pending) - one for one in alone)]
    yield from fixed[:limit]
    for _ in range(limit - len(fixed)):
        share = random.random()
        yield {at for at in pending if random.random() < share}
