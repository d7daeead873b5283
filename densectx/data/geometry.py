"""The same geometry for all parts of a sample that have rows and columns.

Sizes and places are those of the image, in pixels; a target that is ``info.scale`` times as large follows on its own
grid, so that its pixels stay over those of the image.
"""

from __future__ import annotations

from types import EllipsisType
from typing import TypeAlias

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from densectx.errors import DataError
from densectx.types import Sample, SourceInfo

Size: TypeAlias = tuple[int, int]
"""(height, width)"""

SPATIAL = ("image", "mask", "target", "valid")
"""Keys of a sample whose last two dimensions are rows and columns."""


def parts(sample: Sample, info: SourceInfo) -> Sample:
    """What a sample has of :data:`SPATIAL`.

    Raises:
        DataError: a label has another size than its image (times ``info.scale`` for the target).
    """
    found = {key: sample[key] for key in SPATIAL if key in sample}
    height, width = size_of(found)
    for key, part in found.items():
        by = _factor(key, info)
        if tuple(part.shape[-2:]) != (height * by, width * by):
            rule = "they must have the same size" if by == 1 else f"expected {height * by}x{width * by}, {by} times it"
            raise DataError(
                f"the {key} is {part.shape[-2]}x{part.shape[-1]} but its image is {height}x{width} (height x width);"
                f" {rule}."
            )
    return found


def size_of(sample: Sample) -> Size:
    """Of the image."""
    height, width = sample["image"].shape[-2:]
    return height, width


def resize(sample: Sample, size: Size, info: SourceInfo) -> Sample:
    """Parts at a new size of the image.

    Images bilinearly with antialiasing, clamped to [0, 1]; ids and labels by nearest neighbour; maps bilinearly with
    antialiasing, where NaN spreads to every pixel it touches.
    """
    return {
        key: _resize(part, (size[0] * _factor(key, info), size[1] * _factor(key, info)), _kind(key, info))
        for key, part in sample.items()
    }


def window(sample: Sample, place: Size, size: Size, info: SourceInfo) -> Sample:
    """The part of ``size`` whose first row and column are ``place``, as views."""
    return {key: part[_box(place, size, _factor(key, info))] for key, part in sample.items()}


def paste(sample: Sample, other: Sample, place: Size, size: Size, info: SourceInfo) -> Sample:
    """New parts that are ``other``'s inside the box and the sample's outside; both have the same keys and sizes."""
    pasted = {key: part.clone() for key, part in sample.items()}
    for key, part in pasted.items():
        box = _box(place, size, _factor(key, info))
        part[box] = other[key][box]
    return pasted


def pad(sample: Sample, size: Size, info: SourceInfo) -> Sample:
    """Parts enlarged to ``size`` at the bottom and on the right.

    The image repeats its last row and column, as the model's own padding does; masks are filled with the source's
    ``ignore_index``, targets with NaN, ``valid`` with false.
    """
    height, width = size_of(sample)
    rows, columns = size[0] - height, size[1] - width
    if not rows and not columns:
        return sample
    padded = {}
    for key, part in sample.items():
        by = _factor(key, info)
        margin = (0, columns * by, 0, rows * by)
        if key == "image":
            padded[key] = nnf.pad(part[None], margin, mode="replicate")[0]
        else:
            padded[key] = nnf.pad(part, margin, value=False if key == "valid" else unlabelled(part, info))
    return padded


def surrounded(sample: Sample, place: Size, size: Size, border: int, info: SourceInfo) -> Sample:
    """The window of ``size`` at ``place`` with ``border`` more pixels of what surrounds it on each side.

    Beyond the picture the image is mirrored without its edge pixel (reflect-101), as often as it takes. Labels are
    kept where window and picture overlap and are unknown elsewhere, also beside the window inside the picture;
    ``valid`` is false there.

    Args:
        sample: parts of one size.
        place: first row and column; negative, or near the end, for a window that reaches beyond the picture.
        size: of the window.
        border: pixels on each side, in the image's pixels as all of these.
        info: of the source.

    Returns:
        New parts of ``size`` + 2 ``border``.
    """
    found = {}
    for key, part in sample.items():
        by = _factor(key, info)
        axes = list(zip((-2, -1), (p * by for p in place), (s * by for s in size), strict=True))
        if key == "image":
            for axis, first, length in axes:
                index = _mirrored(first - border, first + length + border, part.shape[axis])
                part = part.index_select(axis, index)
            found[key] = part
            continue
        edge = border * by
        shape = (*part.shape[:-2], *(length + 2 * edge for _, _, length in axes))
        fill = False if key == "valid" else unlabelled(part, info)
        found[key] = part.new_full(shape, fill)
        inside = [slice(max(first, 0), min(first + length, part.shape[axis])) for axis, first, length in axes]
        there = [slice(i.start - f + edge, i.stop - f + edge) for i, (_, f, _) in zip(inside, axes, strict=True)]
        found[key][..., there[0], there[1]] = part[..., inside[0], inside[1]]
    return found


def unlabelled(like: Tensor, info: SourceInfo) -> float:
    """The value of a label that is not known: ``ignore_index`` for whole numbers, true for bools, else NaN."""
    if like.dtype == torch.bool:
        return True
    return float("nan") if like.is_floating_point() else info.ignore_index


def _factor(key: str, info: SourceInfo) -> int:
    return info.scale if key == "target" else 1


def _mirrored(start: int, stop: int, length: int) -> Tensor:
    """Indices start..stop of an axis that goes on as numpy's ``pad(mode="reflect")``, length >= 1."""
    index = torch.arange(start, stop) % max(2 * (length - 1), 1)
    return torch.where(index < length, index, 2 * (length - 1) - index)


def _kind(key: str, info: SourceInfo) -> str:
    if key == "target":
        return info.target
    return "image" if key == "image" else "labels"


def _nearest(old: int, new: int) -> Tensor:
    """Of an axis resized from ``old`` to ``new``, the index under each pixel's centre, as torch's "nearest-exact".

    In float32 as there; where a centre falls between two pixels torch takes either, this always the same.
    """
    scale = torch.tensor(old, dtype=torch.float32) / new
    return ((torch.arange(new) + 0.5) * scale).long().clamp_(max=old - 1)


def _box(place: Size, size: Size, by: int) -> tuple[EllipsisType, slice, slice]:
    (top, left), (height, width) = place, size
    return ..., slice(top * by, (top + height) * by), slice(left * by, (left + width) * by)


def _resize(part: Tensor, size: Size, kind: str) -> Tensor:
    if kind == "labels":  # by index, which keeps every id: torchvision resizes whole numbers as float32
        rows, columns = (_nearest(old, new).numpy() for old, new in zip(part.shape[-2:], size, strict=True))
        return torch.from_numpy(part.numpy().take(rows, -2).take(columns, -1))  # faster than torch's index_select
    if size[1] == 1 < size[0]:  # antialiasing is wrong in torch (2.15, CPU) for results of one column, not of one row
        return _resize(part.mT, size[::-1], kind).mT
    scaled: Tensor = F.resize(part, list(size), InterpolationMode.BILINEAR, antialias=True)
    return scaled.clamp_(0, 1) if kind == "image" else scaled
