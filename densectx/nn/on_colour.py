"""Networks of one channel on colour images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from densectx.nn.colour import rgb_to_ycbcr, ycbcr_to_rgb
from densectx.nn.precision import no_autocast
from densectx.nn.resize import bicubic


def per_channel(run: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Each channel on its own: (B, 3, H, W) -> (B, 3 K, H', W') by a network (B, 1, H, W) -> (B, K, H', W')."""
    batch, channels, height, width = image.shape
    answer = run(image.reshape(batch * channels, 1, height, width))
    return answer.reshape(batch, channels * answer.shape[1], *answer.shape[2:])


def luma_only(run: Callable[[Tensor], Tensor], image: Tensor, scale: int) -> Tensor:
    """Luma by a network (B, 1, H, W) -> (B, 1, H * scale, W * scale), chroma by bicubic enlargement; unclamped sRGB.

    Only the network runs under autocast.
    """
    with no_autocast(image.device):
        ycc = rgb_to_ycbcr(image)
        chroma = bicubic(ycc[:, 1:], up=scale)
    answer = run(ycc[:, :1])
    with no_autocast(image.device):
        return ycbcr_to_rgb(torch.cat([answer, chroma], 1))
