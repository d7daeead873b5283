"""Bayer mosaics: which colour each photosite has, and the bilinear picture of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PATTERNS = ("RGGB", "BGGR", "GRBG", "GBRG")


def sites(pattern: str, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Where each colour is measured: (1, 3, H, W) bool, red, green, blue; one of them at every place.

    Args:
        pattern: the colours of the upper left 2x2 places, row by row, one of :data:`PATTERNS`.
        height: H.
        width: W.
        device: of the result.
    """
    cell = torch.tensor(["RGB".index(colour) for colour in pattern], device=device).view(2, 2)
    rows, columns = (torch.arange(size, device=device) % 2 for size in (height, width))
    colour = cell[rows][:, columns]
    return (colour == torch.arange(3, device=device).view(3, 1, 1))[None]


def mosaic(image: Tensor, pattern: str) -> Tensor:
    """Each place's own colour alone: (B, 3, H, W) -> (B, 1, H, W)."""
    where = sites(pattern, image.shape[-2], image.shape[-1], image.device)
    return (image * where).sum(1, keepdim=True)


def bilinear(raw: Tensor, pattern: str) -> Tensor:
    """The picture of a mosaic by bilinear interpolation of each colour: (B, 1, H, W) -> (B, 3, H, W).

    Measured values are kept; others are the mean of the two or four nearest of their colour, at the border of those
    that are there. Where a colour has none (images one pixel wide or high), it is the mosaic's own value.
    """
    where = sites(pattern, raw.shape[-2], raw.shape[-1], raw.device).to(raw.dtype)
    side = raw.new_tensor([1.0, 2.0, 1.0])
    kernel = (side[:, None] * side).expand(3, 1, 3, 3)
    # no colour has neighbours both beside and diagonal to a place of another colour: the weights are equal there
    total = F.conv2d(raw * where, kernel, padding=1, groups=3)
    count = F.conv2d(where, kernel, padding=1, groups=3)
    known = total / count.clamp_min(1)
    return torch.where(where.bool() | (count == 0), raw, known)
