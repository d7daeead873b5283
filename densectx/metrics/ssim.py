"""The structural similarity index, in the form of the restoration literature."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # pixels
K1, K2 = 0.01, 0.03


def ssim(prediction: Tensor, target: Tensor, peak: float = 1.0) -> Tensor:
    """Mean structural similarity of each image, at most 1: (B, C, H, W) float32 or float64 twice -> (B,).

    MATLAB's form: the mean over channels and over the places where the whole window fits, see :func:`ssim_map`.

    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004.
    """
    return ssim_map(prediction, target, peak).flatten(1).mean(1)


def ssim_map(x: Tensor, y: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity around each place where the window fits: (B, C, H, W) twice -> (B, C, H - 10, W - 10).

    Gaussian window of 11x11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, population statistics, no padding (Wang et al.
    2004, eq. 13). An image with a side below 11 pixels is measured with a window of that many pixels (square, the
    same sigma), where MATLAB's function answers with -infinity.

    Args:
        x: float32 or float64.
        y: the same shape.
        peak: largest value of the data: 1 for sRGB in [0, 1], 255 for 8 bit.
    """
    size = window_size(x)
    # second moments about the image's own mean: those about 0 lose 1e-4 to rounding in flat regions
    centre = y.mean((-2, -1), keepdim=True)
    x, y = x - centre, y - centre
    mx, my, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y]), size).chunk(5)
    vx, vy, covariance = xx - mx * mx, yy - my * my, xy - mx * my
    mx, my = mx + centre, my + centre
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    return luminance * (2 * covariance + c2) / (vx + vy + c2)


def window_size(x: Tensor) -> int:
    """Side of the window for images (..., H, W): 11, or the shorter side of a smaller image."""
    return min(WINDOW, x.shape[-2], x.shape[-1])


def _blur(x: Tensor, size: int) -> Tensor:
    """The normalised Gaussian where it fits: (B, C, H, W) -> (B, C, H - size + 1, W - size + 1).

    A sum of shifted pictures: convolutions of float32 may be done in TF32, whose mantissas of ten bits are too short
    for differences of second moments.
    """
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    kernel = (-(place**2) / (2 * SIGMA**2)).exp()
    weights = (kernel / kernel.sum()).tolist()
    for axis in (-2, -1):
        places = x.shape[axis] - size + 1
        total = x.narrow(axis, 0, places) * weights[0]
        for start, weight in enumerate(weights[1:], 1):
            total = total.add(x.narrow(axis, start, places), alpha=weight)
        x = total
    return x
