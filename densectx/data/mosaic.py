"""Segmentation without a download: regions with curved borders, filled from real photographs and textures.

The photographs are files of scikit-image's wheel; :data:`SOURCES` states the terms of each as given by the
docstrings of ``skimage.data`` (files without clear terms are left out). Training and validation never share a pixel
of a photograph: validation takes the lower right quarter, training the left half and the upper right quarter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from densectx.data.base import Dataset, Split
from densectx.data.listing import strings
from densectx.data.reader import read_image
from densectx.data.transforms import size_of
from densectx.distributions import how_to_install
from densectx.errors import ConfigError, unknown
from densectx.rng import seed_of
from densectx.types import Sample, SourceInfo

Pixels: TypeAlias = NDArray[np.uint8]


class Source(NamedTuple):
    """A photograph: file, colour of its class, terms, whom to credit, and the box (top, left, height, width) to use."""

    file: str
    colour: tuple[int, int, int]
    terms: str
    credit: str
    box: tuple[int, int, int, int] | None = None


SOURCES: dict[str, Source] = {
    "astronaut": Source("astronaut.png", (255, 127, 14), "public domain", "NASA Great Images"),
    "brick": Source("brick.png", (214, 39, 40), "CC0", "CC0Textures, Bricks25"),
    "camera": Source("camera.png", (127, 127, 127), "CC0", "Lav Varshney"),
    "chelsea": Source("chelsea.png", (188, 189, 34), "CC0", "Stefan van der Walt"),
    "coffee": Source("coffee.png", (140, 86, 75), "CC0", "Rachel Michetti, Pikolo Espresso Bar"),
    "grass": Source("grass.png", (44, 160, 44), "CC0", "linolafett, DeviantArt"),
    "gravel": Source("gravel.png", (23, 190, 207), "CC0", "CC0Textures, Gravel04"),
    "hubble": Source("hubble_deep_field.jpg", (148, 103, 189), "public domain", "NASA, HubbleSite"),
    "retina": Source("retina.jpg", (227, 119, 194), "CC0", "Mikael Häggström", (220, 220, 970, 970)),  # inside the disc
    "rocket": Source("rocket.jpg", (31, 119, 180), "public domain", "SpaceX"),
}

_SCALES = (0.75, 1.5)
_GRID = 5  # points a side of the random fields: borders bend a few times across the image


@final
class Mosaic(Dataset):
    """Images made of patches of photographs; the label of a pixel is the photograph it comes from.

    Every region is where one of several smooth random fields is the largest, filled with one contiguous patch at a
    scale in 0.75..1.5. Where a patch is larger than what a photograph offers, it is reflected repeatedly.
    A sample is a function of (seed, split, index).

    Samples: ``image`` (3, H, W) float32 sRGB in [0, 1], ``gray`` (false), ``mask`` (H, W) int64, every pixel labelled.

    Args:
        split: ``train``, ``val``; ``test`` is the same as ``val``.
        size: one number or [height, width] in pixels.
        length: number of training samples.
        regions: [least, most] regions of an image; a small one may vanish behind the others.
        seed: of everything that is random.
        names: which photographs, in the order of their class ids; default all of :data:`SOURCES`.
        val_length: number of validation samples.

    Raises:
        ConfigError: scikit-image is not installed, or an option is out of range.
    """

    def __init__(
        self,
        *,
        split: Split,
        size: int | Sequence[int] = 128,
        length: int = 4096,
        regions: Sequence[int] = (3, 6),
        seed: int = 0,
        names: Sequence[str] | None = None,
        val_length: int = 64,
    ) -> None:
        if importlib.util.find_spec("skimage") is None:
            raise ConfigError(f"mosaic needs scikit-image's photographs: {how_to_install('scikit-image')}.")
        self.names = tuple(SOURCES) if names is None else strings("names", names)
        for name in self.names:
            if name not in SOURCES:
                raise ConfigError(f"names: {unknown('photograph', name, SOURCES)}")
        if len(set(self.names)) != len(self.names) or len(self.names) < 2:
            raise ConfigError(f"names: expected at least two different photographs, got {list(self.names)}.")
        for key, value in (("length", length), ("val_length", val_length)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{key}: expected a positive number, got {value!r}.")
        self.regions = _regions(regions)
        self.size = size_of(size, "size")
        self.seed = seed
        self.part = "train" if split == "train" else "val"
        self.length = length if split == "train" else val_length
        self.info = SourceInfo(
            classes=self.names,
            palette=tuple(SOURCES[name].colour for name in self.names),
            keys=("image", "mask"),
            size=self.size,
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:  # ends iteration, as of a list
            raise IndexError(index)
        rng = np.random.default_rng(seed_of(self.seed, "mosaic", self.part, index))
        count = int(rng.integers(self.regions[0], self.regions[1] + 1))
        classes = rng.choice(len(self.names), count, replace=count > len(self.names))
        fields = torch.from_numpy(rng.standard_normal((1, count, _GRID, _GRID), dtype=np.float32))
        largest = F.interpolate(fields, self.size, mode="bicubic", align_corners=True)[0].argmax(0).numpy()
        image = np.empty((*self.size, 3), np.uint8)
        for region, label in enumerate(classes):
            inside = largest == region
            rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
            if rows.size:
                box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
                photograph = _photograph(self.names[label])
                areas = split_areas(*photograph.shape[:2])[self.part]
                sizes = np.array([height * width for _, _, height, width in areas])
                top, left, height, width = areas[rng.choice(len(areas), p=sizes / sizes.sum())]
                patch = _patch(photograph[top : top + height, left : left + width], image[box].shape[:2], rng)
                image[box][inside[box]] = patch[inside[box]]
        mask = torch.from_numpy(classes.astype(np.int64)[largest])
        pixels = torch.from_numpy(image).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        return {"image": pixels.div_(255), "gray": torch.tensor(False), "mask": mask}

    def name(self, index: int) -> str:
        """``mosaic/<part>/<index>``."""
        return f"mosaic/{self.part}/{index}"


def split_areas(height: int, width: int) -> dict[str, list[tuple[int, int, int, int]]]:
    """The disjoint areas (top, left, height, width) of a photograph that training and validation take patches from."""
    middle, centre = height // 2, width // 2
    return {
        "train": [(0, 0, height, centre), (0, centre, middle, width - centre)],
        "val": [(middle, centre, height - middle, width - centre)],
    }


def _regions(value: Any) -> tuple[int, int]:
    low, high = size_of(value, "regions")
    if low > high:
        raise ConfigError(f"regions: expected [least, most], got {list(value)!r}.")
    return low, high


@cache  # decoded once a process
def _photograph(name: str) -> Pixels:
    """(H, W, 3) uint8, read-only; gray ones replicated."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = SOURCES[name]
    image, _ = read_image(Path(spec.submodule_search_locations[0], "data", source.file))
    pixels: Pixels = image.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()
    if source.box:
        top, left, height, width = source.box
        pixels = pixels[top : top + height, left : left + width]
    pixels = np.ascontiguousarray(pixels)
    pixels.flags.writeable = False
    return pixels


def _patch(area: Pixels, size: tuple[int, ...], rng: np.random.Generator) -> Pixels:
    """A contiguous part of an area, scaled to (height, width) with nothing from outside the area."""
    scale = rng.uniform(*_SCALES)
    rows, columns = (_span(max(1, round(size[i] / scale)), area.shape[i], rng) for i in (0, 1))
    patch = area[rows][:, columns]
    return np.asarray(Image.fromarray(patch).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _span(length: int, available: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``length`` consecutive indices at a random place, reflected at the ends as often as needed."""
    first = int(rng.integers(0, max(available - length, 0) + 1))
    index = np.arange(first, first + length) % (2 * available)
    return np.where(index < available, index, 2 * available - 1 - index)
