"""Random augmentation of single samples, the same geometry for image, mask and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from densectx.data import geometry
from densectx.data.colour import recolour
from densectx.data.crops import Rare, anywhere, share
from densectx.data.draws import happens, integer, uniform
from densectx.data.geometry import Size
from densectx.errors import ConfigError, DataError, suggest
from densectx.types import Sample, SourceInfo

_OPTIONS = ("scale", "crop", "surround", "pad", "rare", "rotate90", "flip", "vertical_flip", "color", "cutmix")


@final
class Augment:
    """Random scale, crop, turn, flips and colour change, in this order, then padding.

    Every draw is from the generator of the call: equal generator, equal sample. What is resized how: see
    :func:`densectx.data.geometry.resize`; a target whose kind is not stated is taken for a map. A paired image (kind
    ``image``) is recoloured as the image is; scaling such a pair changes its degradation as well (noise is averaged).

    Args:
        scale: ``[lo, hi]`` factors, 0 < lo <= hi, uniform; None keeps the size. Without ``pad`` lo is raised so far
            that the scaled image covers the crop.
        crop: size of the result, one number or ``[height, width]``; None keeps all.
        surround: pixels around the crop that the sample has too, for networks whose margins are to see what is really
            there: real ones in the picture, mirrored ones (reflect-101) beyond. Nothing there is labelled, ``valid``
            is false. Samples are crop + 2 surround in size and have ``surround``.
        pad: enlarge images that are smaller than the crop, see :func:`densectx.data.geometry.pad`; samples get
            ``valid``. Without a crop, collation enlarges to the largest of a batch. With ``surround`` the picture is
            in the middle of the crop, and what is around it is mirrored.
        rare: ``{classes: [names or ids], probability: 0.5}``, see :class:`densectx.data.crops.Rare`.
        rotate90: turn by a multiple of 90 degrees. Those by 90 and 270 are drawn only where the result has its size:
            where the turned crop fits, or, without a crop, from square images.
        flip: mirror left and right in half of the calls.
        vertical_flip: mirror top and bottom in half of the calls.
        color: strength in [0, 1] of brightness, contrast and saturation, see :func:`densectx.data.colour.recolour`.
        cutmix: probability of :func:`densectx.data.mix.cutmix`, which the loader does: it takes two samples.
        info: of the source.
        where: key path of the options, for messages.

    Attributes:
        size: (H, W) of the results if all have the same, else None; with the surroundings.

    Raises:
        ConfigError: a value outside these ranges, or options that do not go with each other or with the source.
    """

    def __init__(
        self,
        scale: Sequence[float] | None = None,
        crop: int | Sequence[int] | None = None,
        surround: int = 0,
        pad: bool = False,
        rare: Mapping[str, Any] | None = None,
        rotate90: bool = False,
        flip: bool = False,
        vertical_flip: bool = False,
        color: float = 0.0,
        cutmix: float = 0.0,
        *,
        info: SourceInfo | None = None,
        where: str = "augment",
    ) -> None:
        self.info = info or SourceInfo()
        self.scale = _scale(scale, f"{where}.scale")
        self.crop = None if crop is None else size_of(crop, f"{where}.crop")
        self.surround = _pixels(surround, f"{where}.surround")
        self.pad = _flag(pad, f"{where}.pad")
        self.rare = None if rare is None else Rare.from_config(rare, self.info, f"{where}.rare")
        self.rotate90 = _flag(rotate90, f"{where}.rotate90")
        self.flip = _flag(flip, f"{where}.flip")
        self.vertical_flip = _flag(vertical_flip, f"{where}.vertical_flip")
        self.color = share(color, f"{where}.color")
        self.cutmix = share(cutmix, f"{where}.cutmix")
        self.size = self.crop or (self.info.size if self.scale == (1, 1) else None)
        if self.crop and self.surround:
            self.size = self.crop[0] + 2 * self.surround, self.crop[1] + 2 * self.surround
        self._check(where)

    def _check(self, where: str) -> None:
        """What can be known to be impossible before data is read."""
        size = self.info.size
        if self.crop and size and not self.pad and not self._turns(*size):
            raise ConfigError(
                f"{where}.crop: {_x(self.crop)} is larger than the images, {_x(size)}, at their largest scale"
                f" ({self.scale[1]:g}); choose a smaller crop, or pad: true."
            )
        if self.surround and not self.crop:
            raise ConfigError(
                f"{where}.surround: a whole picture has no surroundings, and a network mirrors it by itself; set"
                f" {where}.crop, or leave surround out."
            )
        if self.rare and not self.crop:
            raise ConfigError(f"{where}.rare: says where a crop is placed, and there is no crop; set {where}.crop.")
        if self.cutmix and not self.crop and self.scale != (1, 1):
            raise ConfigError(f"{where}.cutmix: needs samples of one size; set {where}.crop.")
        if self.color and self.info.channels not in (1, 3):
            raise ConfigError(f"{where}.color: is for 1 or 3 channels, the source has {self.info.channels}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "augment", info: SourceInfo | None = None) -> Augment:
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
        return cls(**config, info=info, where=where)

    def __call__(self, sample: Sample, rng: torch.Generator) -> Sample:
        """A new sample; the given one is left as it is.

        Args:
            sample: unbatched; ``image`` (C, H, W) and what it has of ``mask`` (H, W) and ``target``
                (K, H * scale, W * scale).
            rng: where the draws come from.

        Raises:
            DataError: the image is smaller than the crop at the largest scale, or a label has another size.
        """
        parts = geometry.parts(sample, self.info)
        height, width = geometry.size_of(parts)
        turns = self._turns(height, width)
        if not turns:
            raise DataError(
                f"image {height}x{width} is smaller than crop {_x(self.crop or (1, 1))} even at scale"
                f" {self.scale[1]:g}; choose a smaller crop or a larger scale, or pad: true."
            )
        turn = turns[integer(len(turns) - 1, rng)] if self.rotate90 else 0
        crop = self._turned_crop(turn)
        size = self._scaled_size(height, width, crop, rng)
        if size != (height, width):
            parts = geometry.resize(parts, size, self.info)
        if (self.pad or self.surround) and "valid" not in parts:
            parts["valid"] = torch.ones(size, dtype=torch.bool)
        if crop:
            taken = min(crop[0], size[0]), min(crop[1], size[1])
            place = self.rare.place(parts["mask"], taken, rng) if self.rare and "mask" in parts else None
            place = place or anywhere(size, taken, rng)
            if self.surround:
                place = place[0] - (crop[0] - taken[0]) // 2, place[1] - (crop[1] - taken[1]) // 2
                parts = geometry.surrounded(parts, place, crop, self.surround, self.info)
            else:
                parts = geometry.window(parts, place, taken, self.info)
        if turn:
            parts = {key: part.rot90(turn, (-2, -1)) for key, part in parts.items()}
        for wanted, axis in ((self.flip, -1), (self.vertical_flip, -2)):
            if wanted and happens(0.5, rng):
                parts = {key: part.flip(axis) for key, part in parts.items()}
        if self.color:
            gray = len(parts["image"]) == 1 or bool(sample.get("gray", False))
            pictures = ["image", *(["target"] if self.info.target == "image" and "target" in parts else [])]
            changed = recolour([parts[key] for key in pictures], self.color, gray, rng)
            parts |= dict(zip(pictures, changed, strict=True))
        if self.surround:
            sample = {**sample, "surround": torch.tensor(self.surround)}
        elif self.pad and self.crop:
            parts = geometry.pad(parts, self.crop, self.info)
        return {**sample, **{key: part.contiguous() for key, part in parts.items()}}

    def _turned_crop(self, turn: int) -> Size | None:
        return self.crop[::-1] if self.crop and turn % 2 else self.crop

    def _turns(self, height: int, width: int) -> list[int]:
        """Quarter turns after which an image of this size gives a result of the right one; empty if it cannot."""
        if not self.rotate90:
            turns = [0]
        elif self.crop or height == width:
            turns = [0, 1, 2, 3]
        else:
            turns = [0, 2]
        return [turn for turn in turns if self._least_scale(height, width, self._turned_crop(turn)) <= self.scale[1]]

    def _least_scale(self, height: int, width: int, crop: Size | None) -> float:
        return 0.0 if self.pad or not crop else max(crop[0] / height, crop[1] / width)

    def _scaled_size(self, height: int, width: int, crop: Size | None, rng: torch.Generator) -> Size:
        low, high = self.scale
        low = max(low, self._least_scale(height, width, crop))
        factor = uniform(low, high, rng) if low < high else low
        least_h, least_w = crop if crop and not self.pad else (1, 1)
        return max(round(height * factor), least_h), max(round(width * factor), least_w)


def size_of(value: Any, where: str) -> Size:
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


def _pixels(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{where}: expected a number of pixels of at least 0, got {value!r}.")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: expected true or false, got {value!r}.")
    return value


def _x(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
