"""CutMix for dense labels (Yun et al., ICCV 2019; for segmentation French et al., BMVC 2020)."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from densectx.data import geometry
from densectx.data.draws import integer, uniform
from densectx.errors import DataError
from densectx.types import Sample, SourceInfo


def cutmix(sample: Sample, partner: Sample, rng: torch.Generator, info: SourceInfo) -> Sample:
    """The sample with a random box of the partner's image and labels.

    The box's share of the image is uniform in [0, 1] (Beta(1, 1)), its aspect that of the image. Unlike Yun et al.'s,
    which is cut off at the border, it lies inside, at any place: the share is the one drawn. A label that only one of
    the two has is unknown in the other's part. A gray image and a colour image are not mixed, since a sample is one
    or the other: the sample is returned as it is.

    Args:
        sample: augmented; left as it is.
        partner: augmented, of the same size.
        rng: where share and place come from.
        info: of their source.

    Raises:
        DataError: the two differ in size.
    """
    if _gray(sample) != _gray(partner):
        return sample
    mine, other = geometry.parts(sample, info), geometry.parts(partner, info)
    height, width = geometry.size_of(mine)
    if geometry.size_of(other) != (height, width):
        sizes = "x".join(map(str, geometry.size_of(other)))
        raise DataError(f"cutmix of an image {height}x{width} with one of {sizes}; set augment.crop.")
    for key in geometry.SPATIAL:
        if key in mine and key not in other:
            other[key] = _without(mine[key], info)
        elif key in other and key not in mine:
            mine[key] = _without(other[key], info)
    side = sqrt(uniform(0, 1, rng))
    box = round(height * side), round(width * side)
    place = integer(height - box[0], rng), integer(width - box[1], rng)
    return {**sample, **geometry.paste(mine, other, place, box, info)}


def _without(like: Tensor, info: SourceInfo) -> Tensor:
    return torch.full_like(like, geometry.unlabelled(like, info))


def _gray(sample: Sample) -> bool:
    return bool(sample.get("gray", False))
