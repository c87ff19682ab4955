"""A file system in a file, made to be cut off from its device while somebody works on it.

    image file <-- loop device <-- mount, in a mount namespace that ends with this process
                      ^                ^
                   unplug          shut down

Whatever ends this process, a SIGKILL too: the kernel unmounts what only its namespace holds, and
detaches the device. Nobody else sees the mount. Two ways to lose all that was not synced:

    unplug      the device shrinks to one sector while it is busy, so that every later access of the
                file system fails; what it was handed before stays
    shutdown    the file system is told to stop, and to write nothing more, its log included:
                FS_IOC_SHUTDOWN, as xfstests do it

A device with a cache of its own may lose more: what it was handed since its last flush.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

SIZE_BYTES: Final = 512 << 20
TIMEOUT_S: Final = 60.0
PACKAGES: Final = {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}
"""Of Debian; they hold mkfs.KIND."""

_CLONE_NEWNS: Final = 0x00020000
_LOOP_SET_STATUS64: Final = 0x4C04
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_INFO_BYTES: Final = 232
_SIZELIMIT_AT: Final = 32
_SECTOR_BYTES: Final = 512
_FS_IOC_SHUTDOWN: Final = 0x8004587D
_NO_LOG_FLUSH: Final = 2


class Unable(Exception):
    """This machine cannot do it; the message says what is missing."""


def require(kinds: set[str]) -> None:
    """Raise Unable unless file systems of these kinds can be made and mounted here."""
    for tool, package in [
        ("mount", "mount"),
        *((f"mkfs.{kind}", PACKAGES[kind]) for kind in kinds),
    ]:
        if shutil.which(tool) is None:
            raise Unable(f"there is no {tool}; Debian has it in the package {package}")
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        raise Unable("only root can mount a file, and only where there are loop devices")
    known = Path("/proc/filesystems").read_text().split()
    if unknown := kinds - set(known):
        raise Unable(f"this kernel knows no {min(unknown)}; try modprobe {min(unknown)}")


def enter_namespace() -> None:
    """From here on this process sees its own mounts, and nobody else does. Raises Unable."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        raise Unable(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
    _call("mount", "--make-rprivate", "/")


def _call(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise Unable(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout.strip()


@dataclass
class Volume:
    """An empty file system of that kind, below `folder`; mounted inside a `with`."""

    kind: str
    options: str
    """Of its mount."""
    folder: Path

    def __post_init__(self) -> None:
        self.image, self.path = self.folder / "image", self.folder / "mounted"

    def __enter__(self) -> Self:
        self.path.mkdir()
        with self.image.open("xb") as file:
            file.truncate(SIZE_BYTES)
        _call(f"mkfs.{self.kind}", "-q", self.image)
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        # Lazily: a Ctrl-C may have come in the middle of a remount, and must not be hidden.
        subprocess.run(["umount", "--lazy", self.path], stderr=subprocess.DEVNULL, check=False)

    def mount(self) -> None:
        _call("mount", "-t", self.kind, "-o", f"loop,{self.options}", self.image, self.path)

    def unmount(self) -> None:
        _call("umount", self.path)  # The device was attached by `mount`, and detaches itself.

    def remount(self) -> None:
        """Unmount, which writes all out unless it was cut; mount again, whose log is replayed."""
        self.unmount()
        self.mount()

    def ways(self) -> list[str]:
        """How this one can be cut here."""
        try:
            self.shut_down()
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            return ["unplug"]
        self.remount()
        return ["unplug", "shutdown"]

    def write_out(self) -> None:
        """What a kernel does when it thinks it time: nobody is told what is durable now."""
        _call("sync", "--file-system", self.path)

    def cut(self, way: str) -> None:
        """Lose what was not synced; `remount` shows what is left."""
        if way == "unplug":
            self.unplug()
        else:
            self.shut_down()

    def unplug(self) -> None:
        device = _call("findmnt", "--noheadings", "--output", "SOURCE", self.path)
        file = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            info = bytearray(_LOOP_INFO_BYTES)
            fcntl.ioctl(file, _LOOP_GET_STATUS64, info)
            struct.pack_into("=Q", info, _SIZELIMIT_AT, _SECTOR_BYTES)
            fcntl.ioctl(file, _LOOP_SET_STATUS64, info)
        finally:
            os.close(file)

    def shut_down(self) -> None:
        """Raises OSError(ENOTTY) where the file system cannot."""
        directory = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(directory, _FS_IOC_SHUTDOWN, struct.pack("=I", _NO_LOG_FLUSH))
        finally:
            os.close(directory)

    def can_allocate(self) -> bool:
        """Whether room can be set aside for a file."""
        probe = self.path / "probe"
        try:
            _call("fallocate", "--length", "1M", probe)
            return True
        except Unable:
            return False
        finally:
            probe.unlink(missing_ok=True)
