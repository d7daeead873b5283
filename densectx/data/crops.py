"""Where crops are placed: anywhere, or over a pixel of a rare class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from densectx.data.draws import happens, integer
from densectx.data.geometry import Size
from densectx.errors import ConfigError, suggest, unknown
from densectx.types import SourceInfo

_OPTIONS = ("classes", "probability")


@final
@dataclass(frozen=True)
class Rare:
    """Crops that contain a pixel of one of these classes.

    Attributes:
        ids: class ids.
        probability: of such a crop; the others are placed anywhere.
    """

    ids: tuple[int, ...]
    probability: float

    @classmethod
    def from_config(cls, config: Any, info: SourceInfo, where: str) -> Rare:
        """From ``{classes: [names or ids], probability: 0.5}``.

        Raises:
            ConfigError: the source has no masks or not such a class, or a value of the wrong kind.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"{where}: expected {{classes: [names or ids], probability: 0.5}}, got {config!r}.")
        for key in config:
            if key not in _OPTIONS:
                near = suggest(str(key), _OPTIONS)
                raise ConfigError(f"{where}: unknown option {key!r}{near} Known: {', '.join(_OPTIONS)}.")
        if "mask" not in info.keys or not info.classes:
            raise ConfigError(f"{where}: the source has no masks to look for classes in; leave 'rare' out.")
        named = config.get("classes")
        if not isinstance(named, list | tuple) or not named:
            raise ConfigError(f"{where}.classes: expected a list of class names or ids, got {named!r}.")
        ids = tuple(dict.fromkeys(_class_id(name, info.classes, f"{where}.classes") for name in named))
        return cls(ids, share(config.get("probability", 0.5), f"{where}.probability"))

    def place(self, mask: Tensor, crop: Size, rng: torch.Generator) -> Size | None:
        """First row and column of a crop around a random pixel; None for a crop anywhere.

        A class is drawn among those present, then one of its pixels, then one of the places that contain it.

        Args:
            mask: (H, W) int64.
            crop: at most (H, W).
            rng: where the draws come from.
        """
        if not happens(self.probability, rng):
            return None
        present = [index for index in self.ids if bool((mask == index).any())]
        if not present:
            return None
        pixels = (mask == present[integer(len(present) - 1, rng)]).nonzero()
        row, column = pixels[integer(len(pixels) - 1, rng)].tolist()
        height, width = mask.shape
        return _around(row, height, crop[0], rng), _around(column, width, crop[1], rng)


def anywhere(size: Size, crop: Size, rng: torch.Generator) -> Size:
    """First row and column of a crop, uniform over all places inside the image."""
    top = integer(size[0] - crop[0], rng)
    return top, integer(size[1] - crop[1], rng)


def share(value: Any, where: str) -> float:
    """A number in 0..1.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ConfigError(f"{where}: expected a number in 0..1, got {value!r}.")


def _around(pixel: int, length: int, crop: int, rng: torch.Generator) -> int:
    first, last = max(pixel - crop + 1, 0), min(pixel, length - crop)
    return first + integer(last - first, rng)


def _class_id(name: Any, classes: tuple[str, ...], where: str) -> int:
    if isinstance(name, str):
        if name not in classes:
            raise ConfigError(f"{where}: {unknown('class', name, classes)}")
        return classes.index(name)
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(classes):
        return name
    raise ConfigError(f"{where}: expected class names or ids in 0..{len(classes) - 1}, got {name!r}.")
