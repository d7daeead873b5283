"""How the files of a data set are read: channels, range of values, cache; the one place where they meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from densectx.data.cache import Cache
from densectx.data.labels import read_boundaries, read_colours, read_field, read_mask, read_sbd, read_two_levels
from densectx.data.memory_cache import MemoryCache
from densectx.data.reader import check_channels, extensions_of, range_of, read_image
from densectx.errors import ConfigError

MEMORY: Final = "memory"
"""The cache that is no folder; one of that name is ``./memory``."""


@final
class Files:
    """Reads images and labels, each kind in one way.

    Args:
        channels: of the images, see :func:`densectx.data.reader.read_image`.
        value_range: of TIFF, ``.npy`` and 16-bit PNG images, see there.
        cache: folder of decoded files, see :class:`densectx.data.cache.Cache`, or ``memory``, see
            :class:`densectx.data.memory_cache.MemoryCache`; None decodes every time.
        root: folder of the data, which the cache must not lie in.

    Raises:
        ConfigError: an option out of range, or a cache inside the data.
    """

    def __init__(
        self,
        channels: int = 3,
        value_range: Sequence[float] | None = None,
        cache: str | None = None,
        root: Path | None = None,
    ) -> None:
        self.channels, self.value_range = check_channels(channels), range_of(value_range)
        self._cache = None if cache is None else MemoryCache() if cache == MEMORY else _on_disk(cache, root)

    @property
    def extensions(self) -> frozenset[str]:
        """Of the files that are taken for images."""
        return extensions_of(self.channels)

    def image(self, path: Path) -> tuple[Tensor, bool]:
        """:func:`densectx.data.reader.read_image`."""

        def make() -> dict[str, Tensor]:
            image, gray = read_image(path, self.channels, self.value_range)
            return {"image": image, "gray": torch.tensor(gray)}

        found = self._kept(path, f"image {self.channels} {self.value_range}", make)
        return found["image"], bool(found["gray"])

    def mask(self, path: Path) -> Tensor:
        """:func:`densectx.data.labels.read_mask`; of ``.mat`` files :func:`densectx.data.labels.read_sbd`."""
        read = read_sbd if path.suffix.lower() == ".mat" else read_mask
        return self._kept(path, "mask", lambda: {"mask": read(path)})["mask"]

    def colours(self, path: Path) -> Tensor:
        """:func:`densectx.data.labels.read_colours` as a tensor."""
        return self._kept(path, "colours", lambda: {"colours": torch.from_numpy(read_colours(path))})["colours"]

    def two_levels(self, path: Path) -> Tensor:
        """:func:`densectx.data.labels.read_two_levels`."""
        return self._kept(path, "two levels", lambda: {"mask": read_two_levels(path)})["mask"]

    def field(self, path: Path, channels: int = 1) -> Tensor:
        """:func:`densectx.data.labels.read_field`."""
        return self._kept(path, f"field {channels}", lambda: {"field": read_field(path, channels)})["field"]

    def boundaries(self, path: Path) -> Tensor:
        """:func:`densectx.data.labels.read_boundaries`."""
        return self._kept(path, "boundaries", lambda: {"map": read_boundaries(path)})["map"]

    def _kept(self, path: Path, how: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return make() if self._cache is None else self._cache.get(path, how, make)


def _on_disk(folder: str, root: Path | None) -> Cache:
    """A cache outside of the data."""
    cache = Cache(folder)
    if root and Path(os.path.abspath(cache.folder)).is_relative_to(os.path.abspath(root)):
        raise ConfigError(f"cache: {folder} lies in the folder of the data, {root}; name a folder outside of it.")
    return cache
