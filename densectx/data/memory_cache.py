"""Decoded files kept in the memory of the process that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, final

from torch import Tensor

from densectx.data.cache import Tensors, packed, unpacked
from densectx.memory import free_memory

_RESERVE: Final = 4  # what was free at the start over what is left free


@final
class MemoryCache:
    """What :class:`densectx.data.cache.Cache` is on disk, without a look at the file again.

    Small random crops of large pictures cost far less to take than the pictures to decode, so a GPU waits for decoding
    unless it is done once. Every loader process has a cache of its own: pictures of 8 bits take H * W * channels bytes
    in each. Files that change while a process lives are not seen. From when a quarter of the memory that was free at
    the start is left, further files are decoded every time.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Path, str], Tensors] = {}
        self._least: float | None = None  # bytes to leave free; None while nothing was kept

    def get(self, path: Path, how: str, make: Callable[[], Tensors]) -> Tensors:
        """The kept tensors of a file, as new ones, or those that ``make`` returns, which are kept then.

        Args:
            path: the file.
            how: whatever the result depends on beside the file.
            make: reads the file.

        Raises:
            DataError: what ``make`` raises; nothing is kept then.
        """
        kept = self._kept.get((path, how))
        if kept is not None:
            return unpacked({key: _own(key, tensor) for key, tensor in kept.items()})
        tensors, free = make(), free_memory()
        self._least = free / _RESERVE if self._least is None else self._least
        if free > self._least:
            self._kept[path, how] = {key: _own(key, tensor) for key, tensor in map(packed, tensors.items())}
        return tensors


def _own(key: str, tensor: Tensor) -> Tensor:
    """A copy of what is stored as it is, for nobody else to change; of the rest packing makes new tensors."""
    return tensor.clone() if key.endswith("/") else tensor
