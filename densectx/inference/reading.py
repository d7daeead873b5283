"""The files that a model is run on, read as those that it was trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from densectx.data.reader import is_deep, is_real, read_image
from densectx.errors import ConfigError, DataError
from densectx.inference.inputs import channels_read
from densectx.model import DenseModel
from densectx.types import SourceInfo


@final
@dataclass(frozen=True)
class Reading:
    """How the files are read.

    Attributes:
        channels: 3 for models of gray or colour images (a gray file stays gray), else N.
        value_range: what is 0 and 1 in the files' numbers, None for the rule of their type.
    """

    channels: int
    value_range: tuple[float, float] | None

    @classmethod
    def of(cls, model: DenseModel, tasks: Sequence[str]) -> Reading:
        """As the sources of the tasks were read.

        Raises:
            ConfigError: one file cannot be read for all of them.
        """
        sources = model.config.get("sources", {})
        infos = [SourceInfo.from_config(sources.get(model.task(key).source, {})) for key in tasks]
        ranges = {info.value_range for info in infos}
        if len(ranges) > 1:
            raise ConfigError(f"the tasks were trained on files of different value_range ({ranges}); choose --tasks.")
        return cls(channels_read(info.channels for info in infos), ranges.pop())

    def image(self, path: Path) -> tuple[Tensor, bool]:
        """(1 | channels, H, W) float32 and whether the file has more than 8 bits a channel; raises DataError."""
        image, gray = read_image(path, self.channels, self.value_range)
        return image[:1] if gray and self.channels == 3 else image, is_deep(path)

    def real(self, path: Path) -> bool:
        """Whether pictures are answered with floats: the file holds some, or has a range of its own."""
        try:
            return self.value_range is not None or (os.path.isfile(path) and is_real(path))  # a pipe would block
        except DataError:  # told when its turn comes
            return False
