"""A data set that needs no download."""

from __future__ import annotations

from typing import final

import torch

from densectx.data.base import Dataset, Split
from densectx.errors import ConfigError
from densectx.rng import generator
from densectx.types import Sample, SourceInfo


@final
class Gradients(Dataset):
    """Pictures that change smoothly between four random colours. Samples: ``image`` (3, size, size), ``gray``.

    Args:
        split: which pictures; those of training are drawn from other seeds than those of validation and test.
        size: height and width in pixels.
        length: number of pictures of a split.
    """

    def __init__(self, *, split: Split, size: int = 64, length: int = 256) -> None:
        if size < 2 or length < 1:
            raise ConfigError(f"gradients: size {size} is below 2, or length {length} below 1.")
        self.split, self.size, self.length = split, size, length
        # what a model must know; the same for every split, and known without reading anything
        self.info = SourceInfo(keys=("image",), size=(size, size))

    def __len__(self) -> int:
        """Number of pictures."""
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """One picture: a function of the index, so that it is the same in every process and every epoch."""
        rng = generator("gradients", self.split, index)
        corners = torch.rand(1, 3, 2, 2, generator=rng)
        size = (self.size, self.size)
        image = torch.nn.functional.interpolate(corners, size, mode="bilinear", align_corners=True)[0]
        return {"image": image, "gray": torch.tensor(False)}

    def name(self, index: int) -> str:
        """What messages call it."""
        return f"gradients/{self.split}/{index}"
