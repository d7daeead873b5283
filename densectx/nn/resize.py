"""Padding and resampling by exact integer factors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column so that H and W become multiples: (B, C, H, W) -> (B, C, H', W').

    Valid at every size >= 1; returns the very tensor if nothing has to be added.
    """
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear by an integer factor, half-pixel aligned: (B, C, h, w) -> (B, C, h * factor, w * factor)."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


def bicubic(x: Tensor, *, up: int = 1, down: int = 1) -> Tensor:
    """MATLAB's ``imresize(x, up / down, "bicubic")`` in float: antialiased below 1, mirrored at the borders.

    Agrees with MATLAB to 1e-12 in float64, borders included; the degradation and the baseline of the
    super-resolution literature.

    Args:
        x: (B, C, H, W) float; H and W multiples of ``down``.
        up: integer enlargement (with ``down`` 1).
        down: integer reduction (with ``up`` 1).

    Returns:
        (B, C, H * up / down, W * up / down), not clamped.
    """
    if up == down:
        return x
    margin = 4 * down  # the antialiased kernel reaches 2 * down pixels; a multiple of down keeps the phase
    size = ((x.shape[-2] + 2 * margin) * up // down, (x.shape[-1] + 2 * margin) * up // down)
    y = F.interpolate(mirror(x, margin), size=size, mode="bicubic", antialias=True, align_corners=False)
    crop = margin * up // down
    return y[..., crop : size[0] - crop, crop : size[1] - crop]


def mirror(x: Tensor, margin: int) -> Tensor:
    """Mirror with the edge pixel repeated (MATLAB's ``symmetric``), at any size: (..., H, W) -> (..., H+2m, W+2m)."""
    for dim in (-2, -1):
        n = x.shape[dim]
        index = torch.arange(-margin, n + margin, device=x.device) % (2 * n)
        x = x.index_select(dim, torch.where(index < n, index, 2 * n - 1 - index))
    return x


def reflect101(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Mirror without the edge pixel (OpenCV's reflect-101), as often as it takes; negative margins cut off.

    (..., H, W) -> (..., H + top + bottom, W + left + right), any size >= 1; numpy's ``pad(mode="reflect")``.
    """
    for dim, before, after in ((-2, top, bottom), (-1, left, right)):
        n = x.shape[dim]
        if before or after:
            index = torch.arange(-before, n + after, device=x.device) % max(2 * (n - 1), 1)
            x = x.index_select(dim, torch.where(index < n, index, 2 * (n - 1) - index))
    return x


def interp_map(x: Tensor, factor: int) -> Tensor:
    """Bilinear with cell i at pixel ``factor * i``: (B, C, h, w) -> (B, C, h * factor, w * factor).

    ``interp_map`` of Yu & Koltun's code, without the half-pixel shift of :func:`upsample`; pixels behind the last cell
    repeat it, where theirs would read beyond the map.
    """
    h, w = x.shape[-2:]
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    y = F.interpolate(padded, size=(h * factor + 1, w * factor + 1), mode="bilinear", align_corners=True)
    return y[..., : h * factor, : w * factor]


def deconvolution(x: Tensor, factor: int) -> Tensor:
    """Fixed bilinear transposed convolution, kernel 2 f, stride f, padding f / 2: (B, C, h, w) -> (B, C, h f, w f).

    Caffe's bilinear filler: :func:`upsample` but for the outer f / 2 pixels, which fade to 0.
    """
    position = torch.arange(2 * factor, dtype=x.dtype, device=x.device)
    line = 1 - (position / factor - (2 * factor - 1 - factor % 2) / (2 * factor)).abs()
    weight = (line[:, None] * line).expand(x.shape[1], 1, -1, -1)
    return F.conv_transpose2d(x, weight, stride=factor, padding=factor // 2, groups=x.shape[1])
