"""Targets that are numbers: maps such as depth, and one two-level mask a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from densectx.data.files import Files
from densectx.errors import ConfigError, DataError


@final
class Fields:
    """Reads maps of numbers, see :func:`densectx.data.labels.read_field`.

    Args:
        scale: what stored numbers are multiplied by, e.g. 0.001 for millimetres as metres.
        invalid: stored number that means unknown; NaN always does.
        channels: numbers a pixel.

    Raises:
        ConfigError: a scale that is 0 or not finite, or no channels.
    """

    def __init__(self, scale: float = 1.0, invalid: float | None = None, channels: int = 1) -> None:
        if not 0 < abs(scale) < float("inf"):
            raise ConfigError(f"target_scale: expected a finite number other than 0, got {scale!r}.")
        if channels < 1:
            raise ConfigError(f"target_channels: expected a positive number, got {channels!r}.")
        self.scale, self.invalid, self.channels = scale, invalid, channels

    def read(self, path: Path, files: Files) -> Tensor:
        """(channels, H, W) float32, NaN where unknown.

        Raises:
            DataError: the file cannot be read, or holds a number that is infinite as float32, times ``scale``, and is
                not ``invalid``.
        """
        values = files.field(path, self.channels)
        if self.invalid is not None:
            # files of float32 hold the nearest number that they can: 1e20 is 100000002004087734272 there
            nearest = torch.tensor(self.invalid, dtype=torch.float32).to(values.dtype)
            values = values.masked_fill((values == self.invalid) | (values == nearest), float("nan"))
        scaled = (values * self.scale).float()
        if count := int(scaled.isinf().sum()):
            what = "infinite" if values.isinf().any() else f"too large for float32 (target_scale {self.scale:g})"
            raise DataError(f"{path}: {count} values are {what}; set 'invalid', or correct it.")
        return scaled


def stack_labels(paths: Sequence[Path], files: Files) -> Tensor:
    """One two-level mask a class, see :func:`densectx.data.labels.read_two_levels`: (K, H, W) float32 of 0 and 1.

    Raises:
        DataError: a file cannot be read, or they differ in size.
    """
    masks = [files.two_levels(path) for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            sizes = [f"{m.shape[0]}x{m.shape[1]}" for m in (masks[0], mask)]
            raise DataError(f"{paths[0]} is {sizes[0]} but {path} is {sizes[1]}; they must have the same size.")
    return torch.stack(masks).float()
