"""How much memory the machine, or the control group of this process, has left."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

OWN: Final = Path("/proc/self/cgroup")
"""The control groups that this process is in."""
GROUPS: Final = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""
_VERSION_1: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2: Final = ("memory.max", "memory.current", "inactive_file")  # limit, used, and cached files in memory.stat


def free_memory() -> int:
    """Bytes that this process can still have: of the machine and of its control groups, the least."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else [2**31]
    info = Path("/proc/meminfo")
    if info.exists() and (match := re.search(r"MemAvailable:\s*(\d+) kB", info.read_text(encoding="ascii"))):
        found = [int(match[1]) * 1024]
    return max(min(found + rooms(OWN, GROUPS)), 0)


def rooms(own: Path, top: Path) -> list[int]:
    """Bytes that each control group of a process can still take, of both versions; fewer than 0 above a limit.

    Args:
        own: the list of the process's groups, ``/proc/self/cgroup``.
        top: where the groups are mounted, ``/sys/fs/cgroup``.

    Returns:
        Of its group and of those above that have a limit (version 1 writes none as a huge one). Groups that are not
        mounted are left out: a container may see its own as the top.
    """
    found = []
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        files = _VERSION_2 if not controllers else _VERSION_1 if "memory" in controllers.split(",") else None
        if files is None:
            continue
        root = top if files is _VERSION_2 else top / "memory"
        names = [name for name in path.split("/") if name not in ("", "..")]
        found += [_room(root.joinpath(*names[:depth]), *files) for depth in range(len(names) + 1)]
    return [room for room in found if room is not None]


def _room(group: Path, limit: str, used: str, inactive: str) -> int | None:
    """Bytes below a group's limit, None without one. Cached files that nobody uses are given up for whoever asks."""
    most, taken = _text(group / limit).strip(), _text(group / used).strip()
    if not most.isdecimal() or not taken.isdecimal():
        return None
    cached = re.search(rf"^{inactive} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
    return int(most) - int(taken) + (int(cached[1]) if cached else 0)


def _text(path: Path) -> str:
    """A file, empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
