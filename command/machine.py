"""What `reverie doctor` asks of the machine: GPU, limits, ports, tokens, disk. Changes nothing.

Each question is one function that gives findings; a system that does not answer is a finding too.
"""

import contextlib
import os
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from actors.home import GIB
from command import record
from command.finding import Finding, error, ok, warning
from command.version_matrix import MATRIX, installed

if TYPE_CHECKING:
    from actors.settings import Settings

QUERY_TIMEOUT_S: Final = 10
MIN_FILES: Final = 4096
"""Open files; Ray's processes and sockets take some hundreds of them, a busy door more."""
GPU_FIELDS: Final = ("name", "driver_version", "memory.total", "memory.used", "mig.mode.current")
OUR_PROGRAMS: Final = ("ray", "raylet", "gcs_server", "reverie", "vllm", "python", "haproxy")
"""Beginnings of the names of processes that a cell consists of."""


def driver(settings: "Settings") -> Iterator[Finding]:
    """The GPU, and whether torch and vLLM are built for it."""
    torch_version = installed(next(each for each in MATRIX if each.name == "torch")) or ""
    is_cpu_build = "+cpu" in torch_version
    found, why = gpus()
    if not found:
        if settings.device == "cuda":
            yield error(
                "driver", f"device=cuda, and {why}", "install NVIDIA's driver, or --set device=cpu"
            )
        else:
            yield ok("driver", f"{why}: the cell runs on the CPU")
        return
    name, number, total, used, mig = found[0]
    told = f"{name}, driver {number}, {int(total) / 1024:.0f} GiB, {int(used)} MiB in use"
    if len(found) > 1:
        told += f"; the first of {len(found)} is used"
    if is_cpu_build:
        yield warning("driver", f"{told}; torch {torch_version} cannot use it", "make EXTRA=cuda")
    elif mig == "Enabled":
        yield warning("driver", f"{told}; it is cut into MIG slices", "give Ray one whole slice")
    else:
        yield ok("driver", told)
    if "expandable_segments:true" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "").lower():
        yield error(
            "CUDA IPC",
            "PYTORCH_CUDA_ALLOC_CONF has expandable_segments, whose memory cannot be shared",
            "unset PYTORCH_CUDA_ALLOC_CONF",
        )


def gpus() -> tuple[list[list[str]], str]:
    """Those that the driver names, as rows of GPU_FIELDS; and why, if there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        has_device = Path("/dev/nvidia0").exists()
        return [], "there is a GPU but no nvidia-smi" if has_device else "there is no NVIDIA GPU"
    command = [program, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return [], "nvidia-smi does not answer"
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    whole = [row for row in rows if len(row) == len(GPU_FIELDS) and row[2].isdigit()]
    return whole, "nvidia-smi finds no GPU"


def limits(shared_bytes: int, settings: "Settings") -> Iterator[Finding]:
    """Shared memory that the weights lie in, open files, and processors."""
    try:
        place = shutil.disk_usage("/dev/shm")
    except OSError:
        yield error("shared memory", "there is no /dev/shm", "mount a tmpfs there")
        return
    told = f"{place.free / GIB:.1f} of {place.total / GIB:.1f} GiB free in /dev/shm"
    if place.free < shared_bytes:
        yield error(
            "shared memory",
            f"{told}; the cell needs {shared_bytes / GIB:.1f}",
            "give the container --shm-size or --ipc=host, or remount: "
            "mount -o remount,size=SIZE /dev/shm",
        )
    else:
        yield ok("shared memory", f"{told}; the cell needs {shared_bytes / GIB:.1f}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        reach = "" if hard == resource.RLIM_INFINITY or hard >= MIN_FILES else " (as root)"
        yield warning("open files", f"{shown} at once", f"ulimit -n 65536{reach}")
    else:
        yield ok("open files", f"{shown} at once")
    num_cpus, wanted = os.cpu_count() or 1, settings.engine.threads + settings.trainer.threads
    told = f"{num_cpus} processors, {wanted} threads compute"
    if num_cpus < wanted and settings.device != "cuda":
        yield warning("processors", told, "lower engine.threads or trainer.threads")
    else:
        yield ok("processors", told)


def ports(settings: "Settings") -> Iterator[Finding]:
    """Who listens where others can reach it; and the door's own port."""
    public: dict[str, set[int]] = {}
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        yield warning("ports", "this system does not say who listens", "look with 'ss -ltnp'")
        return
    for each in connections:
        if each.status == psutil.CONN_LISTEN and not _is_loopback(each.laddr.ip):
            public.setdefault(_program(each.pid), set()).add(each.laddr.port)
    ours: dict[str, set[int]] = {}
    for name, at in public.items():
        if name.lower().startswith(OUR_PROGRAMS):
            ours.setdefault("Ray's actors" if name.startswith("ray::") else name, set()).update(at)
    if ours:
        told = "; ".join(f"{name} {_listed(at)}" for name, at in sorted(ours.items()))
        yield warning(
            "public ports",
            f"listen on all addresses: {told}",
            "keep a firewall in front of this machine; only the door has keys",
        )
    else:
        yield ok("public ports", "nothing that may be a cell's listens beyond this machine")
    yield from _door(settings)


def _door(settings: "Settings") -> Iterator[Finding]:
    from door.keys import KeyStore

    place = f"{settings.host}:{settings.port}"
    found = record.read(settings.home, settings.port)
    num_keys = len(KeyStore(settings.home).records())
    if not settings.is_loopback and not num_keys:
        yield error(
            "door", f"{place} would be public without keys", "reverie keys add --scope teach"
        )
    elif found is not None and found.process() is not None:
        yield ok("door", f"{place} is this cell's ('reverie up', pid {found.pid}); {num_keys} keys")
    else:
        with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, settings.port))
            except OSError as failed:
                told = f"{place}: {failed.strerror}"
                yield error("door", told, "choose another with --port, or stop what runs there")
                return
        yield ok("door", f"{place} is free; {num_keys} keys")


def token(settings: "Settings") -> Iterator[Finding]:
    """Whether Ray's own ports, dashboard and jobs ask for a token."""
    mode = os.environ.get("RAY_AUTH_MODE")
    found = record.read(settings.home, settings.port)
    if found is not None and found.process() is not None:
        mode, where = found.auth_mode, "the cell that runs"
    else:
        where = "a cell that is started here"
    # Unset, Ray takes a token for a cluster that it starts itself.
    if mode not in (None, "token"):
        yield warning(
            "Ray's token",
            f"{where} has none (RAY_AUTH_MODE={mode}): who reaches Ray's ports runs code here",
            "unset RAY_AUTH_MODE, or set it to token",
        )
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            shown = str(path).replace(str(Path.home()), "~")
            yield warning("Ray's token", f"others can read {shown}", f"chmod 600 {shown}")
            return
    yield ok("Ray's token", f"{where} asks for it")


def disk(home: Path, needed_bytes: int) -> Iterator[Finding]:
    """Room under REVERIE_HOME, and whether two directories can be swapped in one step there."""
    from apollo.journal.disk import RealDisk

    try:
        home.mkdir(parents=True, exist_ok=True)
        place = home / "models" if (home / "models").is_dir() else home
        free = shutil.disk_usage(place).free
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place.resolve()) as probe:
            for name in ("one", "two"):
                (Path(probe) / name).mkdir()
            try:
                RealDisk(Path(probe)).exchange("one", "two")
                can_exchange = True
            except OSError:
                can_exchange = False
    except OSError as failed:
        yield error("disk", f"{home}: {failed.strerror}", "set REVERIE_HOME to a place of yours")
        return
    told = f"{free / GIB:.1f} GiB free under REVERIE_HOME; the model needs {needed_bytes / GIB:.1f}"
    if free < needed_bytes:
        yield error("disk", told, "free some space, or set REVERIE_HOME to another disk")
    else:
        yield ok("disk", told)
    if can_exchange:
        yield ok("publication", "this file system exchanges two directories in one step")
    else:
        yield warning(
            "publication",
            "this file system cannot exchange directories: at a publication there is none for "
            "an instant",
            "set REVERIE_HOME to a local disk (ext4, xfs, btrfs)",
        )


def programs() -> Iterator[Finding]:
    """Programs that some commands call."""
    if shutil.which("rsync"):
        yield ok("rsync", "there, for 'reverie mirror'")
    else:
        yield warning("rsync", "not there: 'reverie mirror' cannot run", "install rsync")


def available_bytes() -> int:
    """Memory that a new process could have, within the container's limit."""
    free = int(psutil.virtual_memory().available)
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, IndexError):
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        cached = (root / "memory.stat").read_text().partition("\ninactive_file ")[2].split()[0]
        free = min(free, limit - used + int(cached))
    return max(0, free)


def _program(pid: int | None) -> str:
    with contextlib.suppress(psutil.Error):
        if pid is not None:
            return str(psutil.Process(pid).name())
    return "unknown"


def _is_loopback(address: str) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)


def _listed(numbers: set[int]) -> str:
    shown = sorted(numbers)
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(map(str, shown[:4])) + more
