"""Looking a data set over before hours of training: every sample is read once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from densectx.data.base import Dataset
from densectx.data.transforms import Augment
from densectx.errors import DataError
from densectx.rng import generator
from densectx.types import Sample, SourceInfo


class Seen(NamedTuple):
    """What is kept of a sample.

    Attributes:
        name: what messages call it.
        error: why it cannot be used, empty if it can.
        size: (height, width).
        gray: whether its file has one channel.
        content: SHA-256 of the image's numbers.
        counts: labelled pixels of each class, None without a mask.
        unlabelled: whether it has a label and nothing in it is labelled.
        low: least known value of its target, None without.
        high: greatest.
    """

    name: str
    error: str = ""
    size: tuple[int, int] = (0, 0)
    gray: bool = False
    content: str = ""
    counts: list[int] | None = None
    unlabelled: bool = False
    low: float | None = None
    high: float | None = None


@final
class _Looks(TorchDataset[Seen]):
    """Samples as what is kept of them; nothing escapes but bugs."""

    def __init__(self, dataset: Dataset, augment: Augment | None) -> None:
        self._dataset, self._augment = dataset, augment

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Seen:
        name = self._dataset.name(index)
        try:
            sample = self._dataset[index]
            seen = _look(name, sample, self._dataset.info)
            if self._augment is not None:
                self._augment(sample, generator(0, "lint", index))
        except DataError as error:
            return Seen(name, error=str(error) if name in str(error) else f"{name}: {error}")
        return seen


def look(dataset: Dataset, augment: Augment | None, workers: int) -> Iterator[Seen]:
    """Every sample of a data set, read and augmented once.

    Args:
        dataset: one split of a source.
        augment: that of the config for training; what cannot be augmented is an error.
        workers: loader processes.

    Raises:
        DataError: the split cannot be listed.
    """
    looks = _Looks(dataset, augment)
    if not len(looks):
        return
    for batch in DataLoader(looks, batch_size=8, num_workers=workers, collate_fn=list):
        yield from batch


def _look(name: str, sample: Sample, info: SourceInfo) -> Seen:
    image, mask, target = sample["image"], sample.get("mask"), sample.get("target")
    height, width = image.shape[-2:]
    seen = Seen(name, size=(height, width), gray=bool(sample.get("gray", False)))
    seen = seen._replace(content=hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest())
    if mask is not None:
        known = mask[mask != info.ignore_index]
        counts = torch.bincount(known, minlength=len(info.classes)).tolist()
        seen = seen._replace(counts=counts, unlabelled=known.numel() == 0)
    if target is not None:
        values = target[~target.isnan()]
        if values.numel():
            seen = seen._replace(low=float(values.min()), high=float(values.max()))
        else:
            seen = seen._replace(unlabelled=True)
    return seen


@final
@dataclass
class Survey:
    """What was found in one split of a source.

    Attributes:
        samples: how many were looked at.
        errors: a message for every sample that cannot be used.
        unlabelled: names of those without a single labelled pixel.
        sizes: ((height, width), (height, width)): least and greatest of either side.
        gray: how many have one channel.
        pixels: labelled pixels of each class, empty without masks.
        images: how many images each class occurs in.
        low: least value of the targets, None without.
        high: greatest.
        contents: names by content.
    """

    samples: int = 0
    errors: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    gray: int = 0
    pixels: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    contents: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, seen: Seen) -> None:
        """Count a sample."""
        self.samples += 1
        if seen.error:
            self.errors.append(seen.error)
            return
        (h, w), old = seen.size, self.sizes or (seen.size, seen.size)
        self.sizes = ((min(old[0][0], h), min(old[0][1], w)), (max(old[1][0], h), max(old[1][1], w)))
        self.gray += seen.gray
        self.contents[seen.content].append(seen.name)
        if seen.unlabelled:
            self.unlabelled.append(seen.name)
        if seen.counts is not None:
            self.pixels = [a + b for a, b in zip(self.pixels or [0] * len(seen.counts), seen.counts, strict=True)]
            present = [int(count > 0) for count in seen.counts]
            self.images = [a + b for a, b in zip(self.images or [0] * len(present), present, strict=True)]
        if seen.low is not None and seen.high is not None:
            self.low = seen.low if self.low is None else min(self.low, seen.low)
            self.high = seen.high if self.high is None else max(self.high, seen.high)

    def to_json(self) -> dict[str, Any]:
        """Numbers only; names are in the problems."""
        return {
            "samples": self.samples,
            "unusable": len(self.errors),
            "sizes": self.sizes,
            "gray": self.gray,
            "pixels": self.pixels,
            "images": self.images,
            "target": None if self.low is None else [self.low, self.high],
        }


def class_weights(pixels: Iterable[int]) -> list[float]:
    """Weights that even out rare classes: 1 / ln(1.02 + share of the pixels) (ENet, Paszke et al. 2016).

    Args:
        pixels: labelled pixels of each class; one that never occurs is weighted as the rarest possible, 50.5.
    """
    counts = torch.tensor(list(pixels), dtype=torch.float64)
    return [round(float(weight), 3) for weight in 1 / (1.02 + counts / counts.sum().clamp_min(1)).log()]
