"""How much memory a pass takes, and how much there is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from densectx.memory import free_memory

_PROBES: Final = (64, 192)  # sides of two small pictures; what grows between them is a pixel's share
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
    """Memory that can be had now: of the device, else :func:`densectx.memory.free_memory`."""
    if device.type != "cuda":
        return free_memory()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of passes before, for the next
    return torch.cuda.mem_get_info(device)[0] + kept


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory; torch has no class of its own for that of the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
