"""A decoder to a stride between the context's and full resolution, for tasks whose answers are smooth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

from torch import Tensor, nn

from densectx.errors import ConfigError
from densectx.heads.base import Head
from densectx.heads.lateral import lateral_steps
from densectx.nn.norm import make_norm
from densectx.nn.resize import upsample
from densectx.types import Feature


@final
class Pyramid(Head):
    """Context features joined with the trunk's finer levels, a linear map for each cell, bilinear upsampling.

    (B, C_i, H / s_i, W / s_i) -> (B, out_channels, H * scale, W * scale). At each finer stride the upsampled map and a
    1x1 convolution of the trunk's deepest map of that stride are added and smoothed by a 3x3 convolution (Lin et al.
    2017); with one finer level it is close to the decoder of DeepLabV3+ (Chen et al. 2018). At stride 4 that costs a
    small part of what :class:`densectx.heads.decoder.Decoder` does at full resolution.

    Args:
        features: given by the model.
        out_channels: given by the task.
        scale: given by the task.
        width: channels of the decoder.
        stride: levels finer than this are not joined.
        norm: ``batch``, ``group`` or null after each 3x3 convolution.
        dropout: probability in [0, 1), on whole channels, before the linear map.

    Raises:
        ConfigError: a width that is not positive, or a dropout out of range.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        out_channels: int,
        scale: int = 1,
        width: int = 64,
        stride: int = 4,
        norm: Literal["batch", "group"] | None = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"head 'pyramid': width {width} is not positive.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"head 'pyramid': dropout {dropout} is not in [0, 1).")
        self.steps, last = lateral_steps(features, stride)
        self.enter = nn.Conv2d(features[-1].channels, width, 1)
        self.laterals = nn.ModuleList(nn.Conv2d(features[level].channels, width, 1) for _, level in self.steps)
        self.merges = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=norm is None),
                *([make_norm(norm, width)] if norm else []),
                nn.ReLU(inplace=True),
            )
            for _ in self.steps
        )
        self.dropout = nn.Dropout2d(dropout)
        self.exit = nn.Conv2d(width, out_channels, 1)
        self.last = last * scale

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """See :class:`Head`."""
        y = self.enter(features[-1])
        for (factor, level), lateral, merge in zip(self.steps, self.laterals, self.merges, strict=True):
            y = merge((upsample(y, factor) + lateral(features[level])).relu_())
        return upsample(self.exit(self.dropout(y)), self.last)
