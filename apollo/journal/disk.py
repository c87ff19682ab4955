"""The one door to the disk: what the journal may do with files, and nothing else.

Every path is relative to the disk's root, its parts separated by `/`. Nothing is durable before a
`sync`: of a file for its bytes, of a directory for the names in it. The tests put a model of a file
system behind this protocol that loses whatever was not synced.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_CANNOT_EXCHANGE: Final = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EBUSY)
_CANNOT_ALLOCATE: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskError(Exception):
    """The disk did not do what was asked; the message says what, without the machine's paths."""


class DiskFull(DiskError):
    """No space is left. What was there is as it was: free some space and try again."""


class DiskFailed(DiskError):
    """Reading, writing or syncing failed.

    After a failed sync nobody knows which bytes are on disk, and a second sync may say that all is
    well: whoever meets this stops, and recovers from what can be read.
    """


class NotAPlainFile(DiskError):
    """A symbolic link, a hard link or a special file lies where a plain file or directory must."""


class Disk(Protocol):
    """Files below one root. Raises FileNotFoundError, FileExistsError, and the errors above."""

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """At most `size` bytes from `offset`; fewer at the file's end."""

    def size(self, path: str) -> int:
        """Bytes of a file."""

    def names(self, directory: str) -> list[str]:
        """What a directory holds, sorted; an empty list if there is no such directory."""

    def is_directory(self, path: str) -> bool:
        """Whether a directory (not a link to one) is there."""

    def create(self, path: str, size: int = 0) -> None:
        """A new file, with room for `size` bytes set aside where the file system can."""

    def write(self, path: str, offset: int, data: bytes | memoryview) -> None:
        """All of `data`, at `offset` of a file that exists."""

    def sync(self, path: str) -> None:
        """Return when a file's bytes, or a directory's names, will survive a loss of power."""

    def rename(self, old: str, new: str) -> None:
        """Atomic; replaces a file at `new`."""

    def exchange(self, first: str, second: str) -> None:
        """Swap two directories in one atomic step. Raises OSError(EXDEV) where that cannot be."""

    def make_directory(self, path: str) -> None:
        """A new directory; its parent must be there."""

    def remove(self, path: str) -> None:
        """A file, or an empty directory."""

    def is_leased(self, directory: str) -> bool:
        """Whether somebody reads from the directory, see `lease`."""


class RealDisk:
    """`Disk` over one directory of this machine. A file that is written is one thread's."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, path: str) -> Path:
        """Where `path` lies on this machine."""
        parts = path.split("/")
        if path.startswith("/") or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{path!r} is not a plain path below the root")
        # `models` and `state` may be links to another disk; nothing below them may.
        return (self._root / parts[0]).resolve().joinpath(*parts[1:])

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        with _errors(f"read {path}"), _opened(self.path(path), os.O_RDONLY) as file:
            left = os.fstat(file).st_size - offset if size is None else size
            pieces = []
            while left > 0 and (piece := os.pread(file, left, offset)):
                pieces.append(piece)
                left -= len(piece)
                offset += len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def size(self, path: str) -> int:
        with _errors(f"look at {path}"), _opened(self.path(path), os.O_RDONLY) as file:
            return os.fstat(file).st_size

    def names(self, directory: str) -> list[str]:
        with _errors(f"list {directory}"), contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self.path(directory)))
        return []

    def is_directory(self, path: str) -> bool:
        with contextlib.suppress(FileNotFoundError), _errors(f"look at {path}"):
            return stat.S_ISDIR(os.lstat(self.path(path)).st_mode)
        return False

    def create(self, path: str, size: int = 0) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        # A model is for any loader; what it learned from, step by step, is this user's alone.
        mode = 0o644 if path.startswith("models/") else 0o600
        with _errors(f"create {path}"), _opened(self.path(path), flags, mode) as file:
            if not size:
                return
            try:
                os.posix_fallocate(file, 0, size)
            except OSError as error:
                if error.errno not in _CANNOT_ALLOCATE:
                    raise
                os.ftruncate(file, size)

    def write(self, path: str, offset: int, data: bytes | memoryview) -> None:
        left = memoryview(data).cast("B")
        with _errors(f"write {path}"), _opened(self.path(path), os.O_WRONLY) as file:
            while left:
                written = os.pwrite(file, left, offset)
                left = left[written:]
                offset += written

    def sync(self, path: str) -> None:
        # EIO, and ENOSPC of a file system that allocates late: the pages are marked clean already.
        try:
            with _opened(self.path(path), os.O_RDONLY) as file:
                os.fsync(file)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DiskFailed(f"cannot sync {path}: {error.strerror}") from None

    def rename(self, old: str, new: str) -> None:
        with _errors(f"rename {old}"):
            os.rename(self.path(old), self.path(new))

    def exchange(self, first: str, second: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        one, two = os.fsencode(self.path(first)), os.fsencode(self.path(second))
        if libc.renameat2(_AT_FDCWD, one, _AT_FDCWD, two, _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code in _CANNOT_EXCHANGE:
            raise OSError(errno.EXDEV, "this file system cannot exchange two directories")
        with _errors(f"exchange {first} and {second}"):
            raise OSError(code, os.strerror(code))

    def make_directory(self, path: str) -> None:
        with _errors(f"make {path}"):
            self.path(path).mkdir(mode=0o755)

    def remove(self, path: str) -> None:
        with _errors(f"remove {path}"):
            if self.is_directory(path):
                self.path(path).rmdir()
            else:
                self.path(path).unlink()

    def refuse_mount_point(self, directory: str) -> None:
        """Raise NotAPlainFile for a directory that cannot be swapped with another one."""
        if os.path.ismount(self.path(directory)):
            raise NotAPlainFile(
                f"{directory} is a mount point, which cannot be swapped with another directory; "
                "mount the directory above it"
            )

    def is_leased(self, directory: str) -> bool:
        with _errors(f"look at {directory}"), contextlib.suppress(FileNotFoundError):
            file = os.open(self.path(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(file)
        return False


@contextlib.contextmanager
def lease(directory: Path) -> Iterator[Path]:
    """A path under which the directory that is public now stays as it is while it is held.

    Without one, a reader of several files may open the first before a publication and the second
    after it. The path names the directory itself, whatever happens to its name.
    """
    while True:
        file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            # If it ceased to be public before it was locked, it may be emptied by now.
            if os.path.samestat(os.fstat(file), os.stat(directory)):
                yield Path(f"/proc/{os.getpid()}/fd/{file}")
                return
        finally:
            os.close(file)


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """Turn the system's errors into the disk's, but for the two that callers expect."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        kind = DiskFull if error.errno in _FULL else DiskFailed
        raise kind(f"cannot {what}: {error.strerror}") from None


@contextlib.contextmanager
def _opened(path: Path, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A descriptor of a plain file or directory; links of both kinds are refused."""
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotAPlainFile(f"{path.name} is a symbolic link; put the file there") from None
        raise
    try:
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
            raise NotAPlainFile(f"{path.name} is a hard link of another file; put a copy there")
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise NotAPlainFile(f"{path.name} is neither a file nor a directory")
        yield file
    finally:
        os.close(file)
