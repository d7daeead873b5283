"""A decoder back to full resolution, for tasks that need every pixel's detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, final

from torch import Tensor, nn

from densectx.errors import ConfigError
from densectx.heads.base import Head
from densectx.heads.correction import corrected, zero_
from densectx.heads.lateral import lateral_steps
from densectx.nn.resize import upsample
from densectx.types import Feature


@final
class Decoder(Head):
    """Context features upsampled step by step, joined with the pyramid's finer levels and the full-resolution input.

    (B, C_i, H / s_i, W / s_i), (B, in_channels, H, W) -> (B, out_channels, H * scale, W * scale).
    Lateral 1x1 convolutions take the deepest map of each finer stride (Lin et al. 2017); the input itself enters
    through a 3x3 convolution; enlargement beyond the input is a pixel shuffle (Shi et al. 2016).

    Args:
        features: given by the model.
        in_channels: given by the task.
        out_channels: given by the task.
        scale: given by the task.
        residual: given by the task: the output corrects the (bicubically enlarged) input, is added in float32 and
            starts at zero, so that the untrained network answers with its input.
        width: channels of the decoder.
        depth: 3x3 convolutions at full input resolution.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        out_channels: int,
        scale: int = 1,
        residual: bool = False,
        width: int = 32,
        depth: int = 2,
    ) -> None:
        super().__init__()
        if min(width, depth) < 1:
            raise ConfigError(f"head 'decoder': width {width} and depth {depth} must be positive.")
        self.scale, self.residual = scale, residual
        self.steps, self.last_step = lateral_steps(features)
        self.enter = nn.Conv2d(features[-1].channels, width, 1)
        self.laterals, self.merges = nn.ModuleList(), nn.ModuleList()
        for _, level in self.steps:
            self.laterals.append(nn.Conv2d(features[level].channels, width, 1))
            self.merges.append(nn.Conv2d(width, width, 3, padding=1))
        self.image = nn.Conv2d(in_channels, width, 3, padding=1)
        self.full = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.exit = nn.Conv2d(width, out_channels * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale) if scale > 1 else nn.Identity()
        if residual:
            zero_(self.exit)

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """See :class:`Head`."""
        y = self.enter(features[-1])
        for (factor, level), lateral, merge in zip(self.steps, self.laterals, self.merges, strict=True):
            y = merge((upsample(y, factor) + lateral(features[level])).relu_()).relu_()
        y = (upsample(y, self.last_step) + self.image(x)).relu_()
        for conv in self.full:
            y = conv(y).relu_()
        y = cast("Tensor", self.shuffle(self.exit(y)))
        return corrected(y, x, self.scale) if self.residual else y
