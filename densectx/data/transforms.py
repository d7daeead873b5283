"""Random augmentation of single samples, the same geometry for image, mask and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from densectx.errors import ConfigError, DataError, suggest
from densectx.types import Sample

_OPTIONS = ("scale", "crop", "flip", "color")
_GEOMETRIC = ("image", "mask", "target")


@final
class Augment:
    """Random scale, crop, horizontal flip and colour change, in this order.

    Every draw is from the generator of the call: equal generator, equal sample. The image is scaled bilinearly with
    antialiasing and clamped to [0, 1], the mask by nearest neighbour, the target bilinearly with antialiasing (NaN
    spreads to every pixel it touches). Scales are uniform in ``scale``, whose lower bound is raised so far that the
    scaled image covers the crop. Colour: brightness, contrast and saturation (not of gray images), in this order,
    each by a factor uniform in [1 - color, 1 + color], the image clamped to [0, 1].

    Args:
        scale: ``[lo, hi]`` factors, 0 < lo <= hi; None keeps the size.
        crop: size of the result, one number or ``[height, width]``; None keeps all.
        flip: mirror left and right in half of the calls.
        color: strength in [0, 1].
        where: key path of the options, for messages.

    Raises:
        ConfigError: a value outside these ranges.
    """

    def __init__(
        self,
        scale: Sequence[float] | None = None,
        crop: int | Sequence[int] | None = None,
        flip: bool = False,
        color: float = 0.0,
        *,
        where: str = "augment",
    ) -> None:
        self.scale = _scale(scale, f"{where}.scale")
        self.crop = None if crop is None else size_of(crop, f"{where}.crop")
        if not isinstance(flip, bool):
            raise ConfigError(f"{where}.flip: expected true or false, got {flip!r}.")
        if not _number(color) or not 0 <= color <= 1:
            raise ConfigError(f"{where}.color: expected a number in 0..1, got {color!r}.")
        self.flip = flip
        self.color = float(color)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "augment") -> Augment:
        """Built from a mapping of a config.

        Raises:
            ConfigError: not a mapping, an unknown key (the nearest is suggested), or a value out of range.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"{where}: expected a mapping of {', '.join(_OPTIONS)}, got {config!r}.")
        for key in config:
            if key not in _OPTIONS:
                near = suggest(str(key), _OPTIONS)
                raise ConfigError(f"{where}: unknown option {key!r}{near} Known: {', '.join(_OPTIONS)}.")
        return cls(**config, where=where)

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        """A new sample; the given one is left as it is.

        Args:
            sample: unbatched; ``image`` (C, H, W) and what it has of ``mask`` (H, W) and ``target`` (K, H, W).
            rng: where the draws come from.

        Raises:
            DataError: the image is smaller than the crop at the largest scale, or a label has another size.
        """
        height, width = sample["image"].shape[-2:]
        parts = {key: sample[key] for key in _GEOMETRIC if key in sample}
        for key, part in parts.items():
            if part.shape[-2:] != (height, width):
                sizes = f"{part.shape[-2]}x{part.shape[-1]}", f"{height}x{width}"
                raise DataError(f"the {key} is {sizes[0]} but its image is {sizes[1]}; they must have the same size.")
        size = self._scaled_size(height, width, rng)
        if size != (height, width):
            parts = {key: _resize(key, part, size) for key, part in parts.items()}
        if self.crop:
            top, left = (_integer(size[i] - self.crop[i], rng) for i in (0, 1))
            parts = {k: p[..., top : top + self.crop[0], left : left + self.crop[1]] for k, p in parts.items()}
        if self.flip and _uniform(0, 1, rng) < 0.5:
            parts = {key: part.flip(-1) for key, part in parts.items()}
        if self.color:
            gray = len(parts["image"]) == 1 or bool(sample.get("gray", False))
            parts["image"] = self._recolour(parts["image"], gray, rng)
        return {**sample, **{key: part.contiguous() for key, part in parts.items()}}

    def _scaled_size(self, height: int, width: int, rng: torch.Generator) -> tuple[int, int]:
        low, high = self.scale
        crop_h, crop_w = self.crop or (1, 1)
        low = max(low, crop_h / height, crop_w / width)
        if low > high:
            raise DataError(
                f"image {height}x{width} is smaller than crop {crop_h}x{crop_w} even at scale {high:g};"
                " choose a smaller crop or a larger scale."
            )
        factor = _uniform(low, high, rng) if low < high else low
        return max(round(height * factor), crop_h), max(round(width * factor), crop_w)

    def _recolour(self, image: Tensor, gray: bool, rng: torch.Generator) -> Tensor:
        def factor() -> float:
            return _uniform(1 - self.color, 1 + self.color, rng)

        image = F.adjust_contrast(F.adjust_brightness(image, factor()), factor())
        return image if gray else F.adjust_saturation(image, factor())


def _resize(key: str, part: Tensor, size: tuple[int, int]) -> Tensor:
    if key == "mask":  # pixel centres as in the bilinear one, unlike plain NEAREST
        nearest: Tensor = F.resize(part[None], list(size), InterpolationMode.NEAREST_EXACT)
        return nearest[0]
    scaled: Tensor = F.resize(part, list(size), InterpolationMode.BILINEAR, antialias=True)
    return scaled.clamp_(0, 1) if key == "image" else scaled


def size_of(value: Any, where: str) -> tuple[int, int]:
    """(height, width) from one positive number or a pair.

    Raises:
        ConfigError: anything else.
    """
    pair = [value, value] if isinstance(value, int) else value
    if (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in pair)
    ):
        return pair[0], pair[1]
    raise ConfigError(f"{where}: expected a positive number or [height, width], got {value!r}.")


def _scale(value: Any, where: str) -> tuple[float, float]:
    if value is None:
        return 1.0, 1.0
    if isinstance(value, Sequence) and len(value) == 2 and all(map(_number, value)) and 0 < value[0] <= value[1]:
        return float(value[0]), float(value[1])
    raise ConfigError(f"{where}: expected [lo, hi] with 0 < lo <= hi, got {value!r}.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")


def _uniform(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _integer(high: int, rng: torch.Generator) -> int:
    """Uniform in 0..high."""
    return int(torch.randint(high + 1, (), generator=rng))
