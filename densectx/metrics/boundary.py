"""Boundary IoU: how well contours are met (Cheng et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def boundary_width(height: int, width: int, share: float) -> int:
    """A share of the picture's diagonal in whole pixels, at least 1 (the paper's 0.02; its published code rounds)."""
    return max(1, round(share * math.hypot(height, width)))


def boundary_band(ids: Tensor, known: Tensor, width: int) -> Tensor:
    """Pixels near a contour: (B, H, W) int64 ids, (B, H, W) bool -> (B, H, W) bool.

    True where a known pixel of another id, or the outside of the picture, lies within ``width`` pixels in both
    directions, and the pixel itself is known. For one class it is what erosion by a square of 2 ``width`` + 1 takes
    away (Cheng et al. 2021, section 4), with unknown pixels on neither side of a contour.
    """
    values = torch.stack([ids, -ids], 1).float().masked_fill(~known[:, None], -math.inf)
    values = F.pad(values, [width] * 4, value=math.inf)
    values = _windows(_windows(values, 2 * width + 1, 3), 2 * width + 1, 2)
    return (values[:, 0] != -values[:, 1]) & known


def _windows(x: Tensor, size: int, dim: int) -> Tensor:
    """The maximum of every window of a size along a dimension, in log2(size) steps of two windows each."""
    span = 1
    while span < size:
        step = min(span, size - span)
        count = x.shape[dim] - step
        x = torch.maximum(x.narrow(dim, 0, count), x.narrow(dim, step, count))
        span += step
    return x


def boundary_counts(prediction: Tensor, truth: Tensor, known: Tensor, classes: int, share: float) -> Tensor:
    """Pixels of the bands along the contours of each class, summed over images.

    Args:
        prediction: (B, H, W) int64 ids.
        truth: (B, H, W) int64 ids; anything where not known.
        known: (B, H, W) bool; the other pixels count nowhere and make no contour.
        classes: K; ids are below.
        share: width of a band / diagonal of the picture.

    Returns:
        (2, K) int64: intersection and union of the bands of truth and prediction.
    """
    height, across = truth.shape[-2:]
    width = boundary_width(height, across, share)
    ours, theirs = boundary_band(prediction, known, width), boundary_band(truth, known, width)
    both = ours & theirs & (prediction == truth)
    hits, predicted, true = (
        torch.bincount(ids[where], minlength=classes)
        for ids, where in ((truth, both), (prediction, ours), (truth, theirs))
    )
    return torch.stack([hits, predicted + true - hits])
