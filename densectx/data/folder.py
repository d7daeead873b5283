"""Images of a folder tree, without labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch

from densectx.data import listing
from densectx.data.base import Dataset, Split
from densectx.data.files import Files
from densectx.data.presets import preset_of
from densectx.errors import DataError
from densectx.types import Sample, SourceInfo


@final
class Folder(Dataset):
    """Every image below the chosen sub-folders, sorted by its path relative to ``root``.

    Samples: ``image`` (channels, H, W) float32 sRGB in [0, 1] and ``gray``.

    Args:
        root: the folder; relative to the working directory, ``~`` is expanded.
        split: which selection to take.
        preset: a well-known layout: ``div2k``; ``splits`` replace its own one by one.
        splits: ``{train: {from: [sub-folders], include: [patterns on name or stem]}, val: ...}``; a split left out
            takes the sub-folder of its own name, ``.`` is the whole tree, null gives a split without samples.
        include: patterns that files of every split must match as well.
        channels: 3 (gray files are replicated), 1 (colour files give BT.601 luma), or N (TIFF and ``.npy`` files).
        value_range: ``[lo, hi]`` of TIFF, ``.npy`` and 16-bit PNG files, see :func:`densectx.data.reader.read_image`.
        cache: folder of decoded files, see :class:`densectx.data.cache.Cache`, or ``memory``: of each loader process,
            see :class:`densectx.data.memory_cache.MemoryCache`; null keeps none.

    Raises:
        ConfigError: an unknown preset, or options of the wrong kind.
    """

    def __init__(
        self,
        root: str,
        *,
        split: Split,
        preset: str | None = None,
        splits: Mapping[str, Any] | None = None,
        include: Sequence[str] | None = None,
        channels: int = 3,
        value_range: Sequence[float] | None = None,
        cache: str | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.files = Files(channels, value_range, cache, self.root)
        self.selection = listing.selections(preset_of("folder", preset).get("splits"), splits)[split]
        self.include = listing.strings("include", include)
        self.info = SourceInfo(channels=channels, value_range=self.files.value_range)

    @cached_property
    def _files(self) -> list[str]:
        if self.selection is None:
            return []
        listing.check_root(self.root, self.key_path)
        every = listing.Selection((), self.include)
        found: set[str] = set()
        listing.check_folders([self.root / subset for subset in self.selection.subsets])
        for subset in self.selection.subsets:
            folder = self.root / subset
            every_file = (os.path.join(folder, name) for name in listing.names(folder, self.files.extensions))
            taken = [path for path in every_file if self.selection.takes(path) and every.takes(path)]
            if not taken:
                patterns = ", ".join([*self.selection.include, *self.include])
                raise DataError(f"{folder}: no image matches {patterns}.")
            found.update(taken)
        return sorted(found)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image, gray = self.files.image(Path(self._files[index]))
        return {"image": image, "gray": torch.tensor(gray)}

    def name(self, index: int) -> str:
        """The path of the file."""
        return self._files[index]

    def paths(self, index: int) -> dict[str, str]:
        """The file of a sample, see :class:`densectx.data.base.Located`."""
        return {"image": self._files[index]}

    def all_files(self) -> list[str]:
        """The files of the split, see :class:`densectx.data.base.FromFiles`."""
        return self._files
