"""Images with class masks or boundary maps in parallel folders; well-known layouts are presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from scipy.io import loadmat
from torch import Tensor

from densectx.data import listing
from densectx.data.base import Dataset, Split
from densectx.data.presets import PRESETS, voc_palette
from densectx.data.reader import read_image, read_mask
from densectx.errors import ConfigError, DataError, unknown
from densectx.types import Sample, SourceInfo


class _Entry(NamedTuple):
    image: Path
    mask: Path | None
    boundaries: Path | None


@final
class ImageMask(Dataset):
    """Pairs of an image and its labels, matched by stem, sorted by the image's path.

    Samples: ``image`` (3, H, W) float32 sRGB in [0, 1], ``gray``, and what the folders give: ``mask`` (H, W) int64,
    ``target`` (1, H, W) float32 in [0, 1], the share of annotators who marked a boundary (BSDS500's files).

    Args:
        root: the folder; relative to the working directory, ``~`` is expanded.
        split: which selection to take.
        preset: ``camvid``, ``voc`` or ``bsds500``; options given beside it replace its own one by one.
        images: folder of the images below root; ``{subset}`` stands for each name in a split's ``from``.
        masks: folder of the masks; files of palette indices or gray values.
        lists: text file that names the images of a subset, one stem or path a line; matched by stem.
        boundaries: folder of BSDS500 ground truth (``.mat``).
        classes: class names, index = id; needed with masks.
        palette: one (R, G, B) in 0..255 a class; default PASCAL VOC's colours.
        ignore_index: id of unlabelled pixels, default 255.
        splits: ``{train: {from: [subsets], include: [patterns on name or stem], labels: true}, val: ...}``;
            a split left out takes the preset's, else the subset of its own name; null gives none.

    Raises:
        ConfigError: unknown preset, or options that do not go together.
    """

    def __init__(
        self,
        root: str,
        *,
        split: Split,
        preset: str | None = None,
        images: str | None = None,
        masks: str | None = None,
        lists: str | None = None,
        boundaries: str | None = None,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        ignore_index: int | None = None,
        splits: Mapping[str, Any] | None = None,
    ) -> None:
        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"preset: {unknown('preset', preset, PRESETS)}")
        base = PRESETS[preset] if preset else {}
        given = {"images": images, "masks": masks, "lists": lists, "boundaries": boundaries}
        folders = {key: base.get(key) if value is None else value for key, value in given.items()}
        if folders["images"] is None or (folders["masks"] is None and folders["boundaries"] is None):
            raise ConfigError(
                "image_mask needs 'images' and 'masks' or 'boundaries' (folders below root), or a 'preset';"
                " for images without labels use the data set 'folder'."
            )
        self.root = Path(root).expanduser()
        self.images: str = folders["images"]
        self.masks, self.lists, self.boundaries = folders["masks"], folders["lists"], folders["boundaries"]
        self.selection = listing.selections(base.get("splits"), splits)[split]
        self.info = _info(base, self.masks, self.boundaries, classes, palette, ignore_index)

    def _folder(self, pattern: str, subset: str) -> Path:
        return self.root / pattern.replace("{subset}", subset)

    @cached_property
    def _entries(self) -> list[_Entry]:
        if self.selection is None:
            return []
        found: dict[Path, _Entry] = {}
        for subset in self.selection.subsets:
            folder = self._folder(self.images, subset)
            images = listing.by_key(folder)
            names = self._folder(self.lists, subset) if self.lists else None
            keys = listing.listed(names, images) if names else images
            taken = {key: images[key] for key in keys if self.selection.takes(images[key])}
            if not taken:
                raise DataError(f"{names or folder}: no image matches {', '.join(self.selection.include)}.")
            masks = self._labels(self.masks, subset, taken, None)
            boundaries = self._labels(self.boundaries, subset, taken, (".mat",))
            found |= {path: _Entry(path, masks.get(key), boundaries.get(key)) for key, path in taken.items()}
        return [found[path] for path in sorted(found, key=Path.as_posix)]

    def _labels(
        self, pattern: str | None, subset: str, images: Mapping[str, Path], extensions: tuple[str, ...] | None
    ) -> dict[str, Path]:
        if pattern is None or self.selection is None or not self.selection.labels:
            return {}
        folder = self._folder(pattern, subset)
        labels = listing.by_key(folder, extensions) if extensions else listing.by_key(folder)
        for key, image in images.items():
            if key not in labels:
                raise DataError(f"{image}: no label file {key!r} (any extension) in {folder}.")
        return labels

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        image, gray = read_image(entry.image)
        sample: Sample = {"image": image, "gray": torch.tensor(gray)}
        if entry.mask:
            sample["mask"] = read_mask(entry.mask)
            _same_size(entry.image, image, entry.mask, sample["mask"])
            _check_ids(entry.mask, sample["mask"], len(self.info.classes), self.info.ignore_index)
        if entry.boundaries:
            sample["target"] = read_boundaries(entry.boundaries)
            _same_size(entry.image, image, entry.boundaries, sample["target"])
        return sample

    def name(self, index: int) -> str:
        """The path of the image."""
        return str(self._entries[index].image)


def read_boundaries(path: Path) -> Tensor:
    """A BSDS500 ground-truth file: (1, H, W) float32, the mean of the annotators' boundary maps.

    Raises:
        DataError: not a MATLAB file, or without ``groundTruth{k}.Boundaries`` of one size.
    """
    try:
        cells = loadmat(str(path))["groundTruth"].ravel()
        maps = [np.asarray(cell["Boundaries"][0, 0], dtype=np.float32) for cell in cells]
        mean = np.mean(np.stack(maps), axis=0, dtype=np.float32)
    except Exception as error:  # SciPy raises nearly anything on damaged files
        raise DataError(f"{path}: no BSDS500 ground truth ({type(error).__name__}: {error}).") from error
    if mean.ndim != 2 or mean.min() < 0 or mean.max() > 1:
        raise DataError(f"{path}: expected boundary maps (H, W) of 0 and 1, got shape {mean.shape}.")
    return torch.from_numpy(mean)[None]


def _info(
    base: Mapping[str, Any],
    masks: str | None,
    boundaries: str | None,
    classes: Sequence[str] | None,
    palette: Sequence[Sequence[int]] | None,
    ignore_index: int | None,
) -> SourceInfo:
    names = listing.strings("classes", base.get("classes") if classes is None else classes)
    if masks and not names:
        raise ConfigError("image_mask with 'masks' needs 'classes': the class names in the order of their ids.")
    colours = palette
    if colours is None:  # a preset's colours belong to its classes
        colours = base["palette"] if classes is None and "palette" in base else voc_palette(len(names))
    if len(colours) != len(names):
        raise ConfigError(f"palette: {len(colours)} colours for {len(names)} classes; give one a class.")
    for colour in colours:
        if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
            raise ConfigError(f"palette: expected [R, G, B] with values in 0..255, got {list(colour)!r}.")
    return SourceInfo(
        classes=names,
        palette=tuple((r, g, b) for r, g, b in colours),
        ignore_index=base.get("ignore_index", 255) if ignore_index is None else ignore_index,
        keys=("image", *(["mask"] if masks else []), *(["target"] if boundaries else [])),
        size=base.get("size"),
    )


def _same_size(image_file: Path, image: Tensor, label_file: Path, label: Tensor) -> None:
    (h, w), (label_h, label_w) = image.shape[-2:], label.shape[-2:]
    if (h, w) != (label_h, label_w):
        raise DataError(
            f"{image_file} is {h}x{w} but its label {label_file} is {label_h}x{label_w} (height x width);"
            " they must have the same size."
        )


def _check_ids(path: Path, mask: Tensor, classes: int, ignore_index: int) -> None:
    counts = mask.flatten().bincount(minlength=classes)
    bad = [i for i in counts[classes:].nonzero().flatten().add(classes).tolist() if i != ignore_index]
    if bad:
        shown = ", ".join(f"{i} ({int(counts[i])} pixels)" for i in bad[:8]) + (", ..." if len(bad) > 8 else "")
        raise DataError(
            f"{path}: unknown class ids {shown}; known are 0..{classes - 1} and ignore_index {ignore_index}."
            " Correct the file, 'classes' or 'ignore_index'."
        )
