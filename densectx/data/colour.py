"""Random brightness, contrast and saturation, one function of colour for all pictures of a scene."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from densectx.data.draws import uniform


def recolour(pictures: Sequence[Tensor], strength: float, gray: bool, rng: torch.Generator) -> list[Tensor]:
    """Pictures after a change of brightness, contrast and saturation, in this order.

    Each is a factor uniform in [1 - strength, 1 + strength], with the meaning of torchvision's ``adjust_*``; the
    gray that contrast is measured from is the mean of the first picture for all, so that two pictures that are equal
    somewhere stay equal there.

    Args:
        pictures: (1 or 3, H, W) float32 sRGB in [0, 1]; NaN stays NaN.
        strength: in [0, 1].
        gray: leave the saturation alone.
        rng: where the factors come from.

    Returns:
        As many new pictures, clamped to [0, 1] after each change.
    """
    brightness, contrast = (uniform(1 - strength, 1 + strength, rng) for _ in range(2))
    pictures = [picture.mul(brightness).clamp_(0, 1) for picture in pictures]
    mean = F.rgb_to_grayscale(pictures[0]).mean()
    pictures = [_blend(picture, mean, contrast) for picture in pictures]
    if not gray:
        saturation = uniform(1 - strength, 1 + strength, rng)
        pictures = [p if len(p) == 1 else _blend(p, F.rgb_to_grayscale(p), saturation) for p in pictures]
    return pictures


def _blend(picture: Tensor, other: Tensor, factor: float) -> Tensor:
    return picture.mul(factor).add_(other, alpha=1 - factor).clamp_(0, 1)
