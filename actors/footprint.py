"""How much memory processes have: what is theirs alone, and what they share with others.

Read from Linux's own sums in /proc; the weights, mapped by two processes, are in what is shared.
Also how a process gives back what it has freed.
"""

import ctypes
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from actors.messages import Footprint

_FIELDS: Final = {
    "Private_Clean:": "private",
    "Private_Dirty:": "private",
    "Private_Hugetlb:": "private",
    "Shared_Clean:": "shared",
    "Shared_Dirty:": "shared",
    "Shared_Hugetlb:": "shared",
}
_KIB: Final = 1024
_MMAP_THRESHOLD: Final = -3  # malloc.h
_LARGE_BYTES: Final = 2**20


def by_role(reports: Mapping[str, Any]) -> dict[str, Footprint]:
    """Of the processes that each report names; those that are not here are left out."""
    found = {role: footprint(pids_of(report)) for role, report in reports.items()}
    return {role: of for role, of in found.items() if of is not None}


def pids_of(report: Any) -> tuple[int, ...]:
    """An actor's process and those that it started."""
    return (report.pid, *getattr(report, "child_pids", ()))


def footprint(pids: Iterable[int]) -> Footprint | None:
    """Of all of these that are here and may be looked at; None if none is."""
    sums, is_any = {"private": 0, "shared": 0}, False
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # It has ended, or it is not this system's.
            continue
        is_any = True
        for line in lines:
            name, *rest = line.split()
            if name in _FIELDS:
                sums[_FIELDS[name]] += int(rest[0]) * _KIB
    return Footprint(sums["private"], sums["shared"]) if is_any else None


def map_large_blocks() -> None:
    """From here on each large block is a mapping of its own, which ends when the block is freed.

    Else glibc learns from the first of them to take them from its arenas, one for each thread, and
    keeps up to 64 MB in the top of each. Does nothing with another C library.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGE_BYTES)


def give_back() -> None:
    """Return to the system what this process has freed; after rare work that takes much.

    glibc keeps it for next time. Blocks for some milliseconds; does nothing with another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
