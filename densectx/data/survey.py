"""Looking a data set over before hours of training: every sample is read once."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from densectx.data.alignment import REACH, Pair, compare, edge_correlation
from densectx.data.base import Dataset, Located
from densectx.data.causes import Cause, Colour, Expected, cause_of, palette_of_file
from densectx.data.likeness import Print, print_of
from densectx.data.reader import is_deep, is_real
from densectx.data.sample_rules import fault, wrong_ids
from densectx.data.transforms import Augment
from densectx.errors import DataError
from densectx.rng import generator
from densectx.types import Sample, SourceInfo

_EDGES: Final = 200  # samples of a split at most whose masks are laid on their pictures


class Seen(NamedTuple):
    """What is kept of a sample.

    Attributes:
        name: what messages call it.
        error: why it cannot be used, empty if it can.
        unread: whether that is because its files cannot be read, or do not fit together.
        cause: what its files say to that.
        size: (height, width).
        gray: whether its file has one channel.
        deep: greatest number of its file where that has 16 bits and no range of its own, else None.
        content: SHA-256 of the image's numbers.
        counts: labelled pixels of each class, None without a mask.
        ignored: pixels of its mask that are not labelled.
        unlabelled: whether it has a label and nothing in it is labelled.
        low: least known value of its target, None without.
        high: greatest.
        print: by which nearly equal pictures are found, None for a flat one.
        pair: how its target picture lies on it, None without.
        edges: how well the borders of its mask lie on its edges, None where that was not looked at.
        palette: colours that its mask file has for the classes that occur; empty where it has none.
    """

    name: str
    error: str = ""
    unread: bool = False
    cause: Cause | None = None
    size: tuple[int, int] = (0, 0)
    gray: bool = False
    deep: int | None = None
    content: str = ""
    counts: list[int] | None = None
    ignored: int = 0
    unlabelled: bool = False
    low: float | None = None
    high: float | None = None
    print: Print | None = None
    pair: Pair | None = None
    edges: Tensor | None = None
    palette: Mapping[int, Colour] = {}


@final
class _Looks(TorchDataset[Seen]):
    """Samples as what is kept of them; nothing escapes but bugs."""

    def __init__(self, dataset: Dataset, augment: Augment | None, expected: Expected) -> None:
        self._dataset, self._augment, self._expected = dataset, augment, expected
        self._every = max(1, len(dataset) // _EDGES)
        self._foreign = not type(dataset).__module__.startswith("densectx.")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Seen:
        dataset, info = self._dataset, self._dataset.info
        name = dataset.name(index)
        paths = dataset.paths(index) if isinstance(dataset, Located) else {}
        try:
            sample = dataset[index]
        except DataError as error:
            return Seen(name, _named(error, name), True, cause_of(paths, info, self._expected))
        if self._foreign and (broken := fault(sample, info, name)):
            return Seen(name, broken)
        seen = _look(name, sample, info)
        if "image" in paths and info.value_range is None and is_deep(paths["image"]) and not is_real(paths["image"]):
            seen = seen._replace(deep=round(float(sample["image"].max()) * 65535))
        if index % self._every == 0 and "mask" in sample:
            seen = seen._replace(edges=edge_correlation(sample["image"], sample["mask"]))
        if seen.counts and "mask" in paths and self._expected.palette and self._expected.direct:
            colours = palette_of_file(paths["mask"])
            seen = seen._replace(palette={i: c for i, c in enumerate(colours[: len(seen.counts)]) if seen.counts[i]})
        try:
            if self._augment is not None:
                self._augment(sample, generator(0, "lint", index))
        except DataError as error:
            return Seen(name, _named(error, name))
        return seen


def _named(error: DataError, name: str) -> str:
    return str(error) if name in str(error) else f"{name}: {error}"


def look(
    dataset: Dataset,
    augment: Augment | None,
    workers: int,
    expected: Expected = Expected(),  # noqa: B008 - immutable
) -> Iterator[Seen]:
    """Every sample of a data set, read and augmented once.

    Args:
        dataset: one split of a source.
        augment: that of the config for training; what cannot be augmented is an error.
        workers: loader processes.
        expected: what its files are compared with.

    Raises:
        DataError: the split cannot be listed.
    """
    if not len(dataset):
        return
    for batch in DataLoader(_Looks(dataset, augment, expected), batch_size=8, num_workers=workers, collate_fn=list):
        yield from batch


def _look(name: str, sample: Sample, info: SourceInfo) -> Seen:
    image, mask, target = sample["image"], sample.get("mask"), sample.get("target")
    height, width = image.shape[-2:]
    seen = Seen(name, size=(height, width), gray=bool(sample.get("gray", False)), print=print_of(image))
    seen = seen._replace(content=hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest())
    if mask is not None:
        known = mask[mask != info.ignore_index]
        if found := wrong_ids(mask, info):
            rule = f"0..{len(info.classes) - 1}, or {info.ignore_index} for unlabelled"
            return Seen(name, f"{name}: the mask has {found}, which are no classes; expected {rule}.")
        counts = torch.bincount(known, minlength=len(info.classes)).tolist()
        ignored = mask.numel() - known.numel()
        seen = seen._replace(counts=counts, ignored=ignored, unlabelled=known.numel() == 0)
    if target is not None:
        values = target[~target.isnan()]
        if values.numel():
            seen = seen._replace(low=float(values.min()), high=float(values.max()))
        else:
            seen = seen._replace(unlabelled=True)
        if info.target == "image":
            seen = seen._replace(pair=compare(image, target))
    return seen


@final
@dataclass
class Survey:
    """What was found in one split of a source.

    Attributes:
        skips: whether samples that cannot be read are passed over (``data.on_corrupt``).
        samples: how many were looked at.
        errors: a message for every sample that cannot be used.
        skipped: the same of those that are passed over.
        causes: what the files of those say, with the name of the sample and its message.
        unlabelled: names of those without a single labelled pixel.
        sizes: ((height, width), (height, width)): least and greatest of either side.
        gray: how many have one channel.
        deep: how many are 16-bit files without a range of their own.
        deepest: greatest number of those.
        pixels: labelled pixels of each class, empty without masks.
        ignored: pixels of masks that are not labelled.
        images: how many images each class occurs in.
        low: least value of the targets, None without.
        high: greatest.
        contents: names by content.
        prints: (name, content, print) of those that are not flat.
        pairs: how target pictures lie on their images, by name.
        edges: sum of the correlations of borders and edges.
        laid: how many that sum has.
        palettes: (class, colour that a mask file has for it) -> number of files.
    """

    skips: bool = False
    samples: int = 0
    errors: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    causes: list[tuple[str, str, Cause]] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    gray: int = 0
    deep: int = 0
    deepest: int = 0
    pixels: list[int] = field(default_factory=list)
    ignored: int = 0
    images: list[int] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    contents: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    prints: list[tuple[str, str, Print]] = field(default_factory=list)
    pairs: list[tuple[str, Pair]] = field(default_factory=list)
    edges: Tensor = field(default_factory=lambda: torch.zeros(2 * REACH + 1, 2 * REACH + 1))
    laid: int = 0
    palettes: Counter[tuple[int, Colour]] = field(default_factory=Counter)

    def add(self, seen: Seen) -> None:
        """Count a sample."""
        self.samples += 1
        if seen.error:
            (self.skipped if self.skips and seen.unread else self.errors).append(seen.error)
            if seen.cause is not None:
                self.causes.append((seen.name, seen.error, seen.cause))
            return
        (h, w), old = seen.size, self.sizes or (seen.size, seen.size)
        self.sizes = ((min(old[0][0], h), min(old[0][1], w)), (max(old[1][0], h), max(old[1][1], w)))
        self.gray += seen.gray
        if seen.deep is not None:
            self.deep, self.deepest = self.deep + 1, max(self.deepest, seen.deep)
        self.contents[seen.content].append(seen.name)
        if seen.print is not None:
            self.prints.append((seen.name, seen.content, seen.print))
        if seen.unlabelled:
            self.unlabelled.append(seen.name)
        if seen.counts is not None:
            self.ignored += seen.ignored
            self.pixels = [a + b for a, b in zip(self.pixels or [0] * len(seen.counts), seen.counts, strict=True)]
            present = [int(count > 0) for count in seen.counts]
            self.images = [a + b for a, b in zip(self.images or [0] * len(present), present, strict=True)]
        if seen.low is not None and seen.high is not None:
            self.low = seen.low if self.low is None else min(self.low, seen.low)
            self.high = seen.high if self.high is None else max(self.high, seen.high)
        if seen.pair is not None:
            self.pairs.append((seen.name, seen.pair))
        if seen.edges is not None and seen.edges.any():
            self.edges, self.laid = self.edges + seen.edges, self.laid + 1
        self.palettes.update(seen.palette.items())

    def to_json(self) -> dict[str, Any]:
        """Numbers only; names are in the problems."""
        return {
            "samples": self.samples,
            "unusable": len(self.errors) + len(self.skipped),
            "sizes": self.sizes,
            "gray": self.gray,
            "pixels": self.pixels,
            "ignored": self.ignored,
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
