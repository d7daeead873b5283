"""Colour spaces in full precision, outside autocast: half precision is visibly wrong here (2.6 % in Lab)."""

from __future__ import annotations

import kornia.color
import torch
from torch import Tensor

from densectx.nn.precision import full, no_autocast


def rgb_to_lab(x: Tensor) -> Tensor:
    """Convert sRGB in [0, 1] to CIE Lab (D65; L 0..100, a and b about -110..110): (B, 3, H, W) float32."""
    with no_autocast(x.device):
        lab: Tensor = kornia.color.rgb_to_lab(full(x))
        return lab


def lab_to_rgb(x: Tensor) -> Tensor:
    """CIE Lab to sRGB, clipped to [0, 1] where the colour is outside the gamut: (B, 3, H, W) float32."""
    with no_autocast(x.device):
        rgb: Tensor = kornia.color.lab_to_rgb(full(x), clip=True)
        return rgb


def luma(x: Tensor) -> Tensor:
    """MATLAB's ``rgb2ycbcr`` luma of sRGB in [0, 1]: 16/255 .. 235/255, not rounded: (B, 3, H, W) -> (B, 1, H, W).

    The Y on which the super-resolution literature measures; 1.32 dB above full-range luma.
    """
    weight = x.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    return ((x * weight).sum(1, keepdim=True) + 16) / 255


def luma_of_grey(x: Tensor) -> Tensor:
    """The :func:`luma` of colours from their :func:`grey`, any shape: the weights are the same, 219 levels for 255."""
    return (219 * x + 16) / 255


def grey(x: Tensor) -> Tensor:
    """Full-range BT.601 luma (JPEG, Pillow): (B, 3, H, W) -> (B, 1, H, W), same range as x; one channel unchanged."""
    if x.shape[1] == 1:
        return x
    weight = x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (x * weight).sum(1, keepdim=True)


def rgb_to_ycbcr(x: Tensor) -> Tensor:
    """Full-range BT.601 (JPEG, ITU-T T.871) with chroma about 0: (B, 3, H, W) -> (B, 3, H, W), nothing clamped.

    The first channel is :func:`grey`.
    """
    y = grey(x)
    return torch.cat([y, (x[:, 2:] - y) / 1.772, (x[:, :1] - y) / 1.402], 1)


def ycbcr_to_rgb(x: Tensor) -> Tensor:
    """The inverse of :func:`rgb_to_ycbcr`, nothing clamped."""
    y, cb, cr = x.unbind(1)
    red, blue = y + 1.402 * cr, y + 1.772 * cb
    return torch.stack([red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue], 1)


def as_rgb(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 3, H, W): three channels unchanged, of more the first three, of fewer the first as gray."""
    return x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
