"""Atrous spatial pyramid pooling, the comparison arm of ablations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from densectx.errors import ConfigError
from densectx.nn.context import Context


@final
class ASPP(Context):
    """Parallel dilated convolutions, merged by a 1x1 convolution: (B, C, h, w) -> (B, C, h, w), h and w >= 1.

    Chen et al. 2017 (DeepLabv3), section 3.3, without normalisation layers; C channels a branch.

    Args:
        in_channels: C, given by the model.
        rates: dilation of each 3x3 branch (12, 24, 36 is the paper's choice for stride 8).
        pooling: add the image-level branch; the receptive field is infinite then, and exact tiling impossible.
    """

    def __init__(self, in_channels: int, rates: Sequence[int] = (12, 24, 36), *, pooling: bool = True) -> None:
        super().__init__()
        if any(rate < 1 for rate in rates):
            raise ConfigError(f"aspp: rates {tuple(rates)} must be positive.")
        self.rates = tuple(rates)
        self.point = nn.Conv2d(in_channels, in_channels, 1)
        self.branches = nn.ModuleList(nn.Conv2d(in_channels, in_channels, 3, padding=r, dilation=r) for r in rates)
        self.pooled = nn.Conv2d(in_channels, in_channels, 1) if pooling else None
        self.merge = nn.Conv2d(in_channels * (1 + len(self.rates) + pooling), in_channels, 1)

    @property
    def receptive_field(self) -> float:
        """Infinite with pooling, else 1 + 2 * the largest rate."""
        return math.inf if self.pooled is not None else 1 + 2 * max(self.rates, default=0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        branches = [self.point(x), *(branch(x) for branch in self.branches)]
        if self.pooled is not None:
            branches.append(self.pooled(x.mean((2, 3), keepdim=True)).expand_as(branches[0]))
        merged: Tensor = self.merge(torch.cat(branches, 1).relu_())
        return merged.relu_()
