"""Small networks with random weights, to compare shift-equivariance errors with.

All convolutions pad circularly, so that what an error shows is the pooling, not the borders.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densectx.nn.context import ContextModule


@final
class SegNetLike(nn.Module):
    """Poolings that remember where the maxima were, and unpoolings that put values back there.

    After Badrinarayanan, Kendall and Cipolla, "SegNet" (2017), at a small width. Of total stride 2^depth.

    Args:
        channels: of the input and the output.
        width: channels inside.
        depth: poolings.
    """

    def __init__(self, channels: int = 3, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList(_conv(channels if level == 0 else width, width) for level in range(depth))
        self.up = nn.ModuleList(_conv(width, width) for _ in range(depth))
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape; H and W multiples of 2^depth."""
        places = []
        for conv in self.down:
            x, indices = F.max_pool2d(F.relu(conv(x)), 2, return_indices=True)
            places.append(indices)
        for conv, indices in zip(self.up, reversed(places), strict=True):
            x = F.relu(conv(F.max_unpool2d(x, indices, [2, 2])))
        y: Tensor = self.last(x)
        return y


@final
class UNetLike(nn.Module):
    """Max poolings, and upsampled features joined to those from before each pooling.

    After Ronneberger, Fischer and Brox, "U-Net" (2015), at a small width. Of total stride 2^depth.

    Args:
        channels: of the input and the output.
        width: channels inside.
        depth: poolings.
    """

    def __init__(self, channels: int = 3, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList(_conv(channels if level == 0 else width, width) for level in range(depth))
        self.bottom = _conv(width, width)
        self.up = nn.ModuleList(_conv(2 * width, width) for _ in range(depth))
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape; H and W multiples of 2^depth."""
        skips = []
        for conv in self.down:
            skips.append(F.relu(conv(x)))
            x = F.max_pool2d(skips[-1], 2)
        x = F.relu(self.bottom(x))
        for conv, skip in zip(self.up, reversed(skips), strict=True):
            x = F.relu(conv(torch.cat([skip, F.interpolate(x, scale_factor=2.0, mode="nearest")], 1)))
        y: Tensor = self.last(x)
        return y


def references(channels: int = 3, seed: int = 0) -> dict[str, nn.Module]:
    """Networks (B, channels, H, W) -> the same shape, H and W multiples of 8, with random weights.

    Args:
        channels: of input and output.
        seed: of the weights; the global generator is left alone.

    Returns:
        ``context`` (the Basic module of Yu & Koltun 2016, padded circularly), ``segnet`` and ``unet`` with three
        poolings; in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks: dict[str, nn.Module] = {
            "context": circular(ContextModule(channels)),
            "segnet": SegNetLike(channels),
            "unet": UNetLike(channels),
        }
        for network in networks.values():
            _randomise(network)
    return {name: network.eval() for name, network in networks.items()}


def circular(network: nn.Module) -> nn.Module:
    """Make every padded convolution of a network pad circularly, in place; returns the network."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"
    return network


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, padding_mode="circular")


@torch.no_grad()
def _randomise(network: nn.Module) -> None:
    """Weights that keep the size of activations through ReLUs."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
