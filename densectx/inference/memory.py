"""How much memory a pass takes, and how much there is."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_PROBES: Final = (64, 192)  # sides of two small pictures; what grows between them is a pixel's share
OWN: Final = Path("/proc/self/cgroup")
"""The control groups that this process is in."""
GROUPS: Final = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""
_VERSION_1: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2: Final = ("memory.max", "memory.current", "inactive_file")  # limit, used, and cached files in memory.stat
WORKSPACE: Final = 1.5
"""What operations take beside their results: reordered copies, columns of convolutions; an allowance."""


@final
class _Live(TorchFunctionMode):
    """Adds up the storages of tensors that functions of torch return and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call and count what comes back."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        place = storage.data_ptr()
        if not place:
            return
        if place not in self.sizes:
            self.sizes[place], self.holders[place] = storage.nbytes(), 0
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self.holders[place] += 1
        weakref.finalize(value, self._gone, place)

    def _gone(self, place: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            self.now -= self.sizes.pop(place)
            del self.holders[place]


def bytes_per_pixel(run: Callable[[Tensor], Any], channels: int, device: torch.device) -> float:
    """Memory that a pass takes for each pixel of its picture, measured on two small ones.

    Args:
        run: (channels, H, W) float32 on the CPU -> answers.
        channels: of the picture.
        device: where the pass runs.
    """
    peaks = []
    for side in _PROBES:
        image = torch.zeros(channels, side, side)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run(image)
            peaks.append(torch.cuda.max_memory_allocated(device) - before)
        else:
            with _Live() as live:
                run(image)
            peaks.append(live.peak)
    return WORKSPACE * max(peaks[1] - peaks[0], 1) / (_PROBES[1] ** 2 - _PROBES[0] ** 2)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now: of the device, else of the machine and of this process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory; torch has no class of its own for that of the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
