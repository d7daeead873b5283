"""Images of a folder tree, without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch

from densectx.data import listing
from densectx.data.base import Dataset, Split
from densectx.data.reader import read_image
from densectx.errors import ConfigError, DataError
from densectx.types import Sample, SourceInfo


@final
class Folder(Dataset):
    """Every image below the chosen sub-folders, sorted by its path relative to ``root``.

    Samples: ``image`` (channels, H, W) float32 sRGB in [0, 1] and ``gray``.

    Args:
        root: the folder; relative to the working directory, ``~`` is expanded.
        split: which selection to take.
        splits: ``{train: {from: [sub-folders], include: [patterns on name or stem]}, val: ...}``; a split left out
            takes the sub-folder of its own name, ``.`` is the whole tree, null gives a split without samples.
        include: patterns that files of every split must match as well.
        channels: 3 (gray files are replicated) or 1 (colour files give BT.601 luma).

    Raises:
        ConfigError: options of the wrong kind.
    """

    def __init__(
        self,
        root: str,
        *,
        split: Split,
        splits: Mapping[str, Any] | None = None,
        include: Sequence[str] | None = None,
        channels: int = 3,
    ) -> None:
        if channels not in (1, 3):
            raise ConfigError(f"channels: expected 1 or 3, got {channels!r}.")
        self.root = Path(root).expanduser()
        self.selection = listing.selections(splits)[split]
        self.include = listing.strings("include", include)
        self.info = SourceInfo(channels=channels)

    @cached_property
    def _files(self) -> list[Path]:
        if self.selection is None:
            return []
        every = listing.Selection((), self.include)
        found: set[Path] = set()
        for subset in self.selection.subsets:
            folder = self.root / subset
            taken = [path for path in listing.files(folder) if self.selection.takes(path) and every.takes(path)]
            if not taken:
                patterns = ", ".join([*self.selection.include, *self.include])
                raise DataError(f"{folder}: no image matches {patterns}.")
            found.update(taken)
        return sorted(found, key=Path.as_posix)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image, gray = read_image(self._files[index], self.info.channels)
        return {"image": image, "gray": torch.tensor(gray)}

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self._files[index])
