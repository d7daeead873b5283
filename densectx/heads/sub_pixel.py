"""The answer's pixels as channels of the cells, for restoration networks whose trunk has lost none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from densectx.heads.base import Head
from densectx.heads.correction import corrected, zero_
from densectx.types import Feature


@final
class SubPixel(Head):
    """A 3x3 convolution on the context features and a pixel shuffle to full size (Shi et al. 2016).

    (B, C, H / s, W / s) -> (B, out_channels, H * scale, W * scale).

    Args:
        features: given by the model.
        out_channels: given by the task.
        scale: given by the task.
        residual: given by the task: the output corrects the (bicubically enlarged) input, is added in float32 and
            starts at zero, so that the untrained network answers with its input.
    """

    reads_pyramid = False

    def __init__(self, features: Sequence[Feature], out_channels: int, scale: int = 1, residual: bool = False) -> None:
        super().__init__()
        self.scale, self.residual = scale, residual
        factor = features[-1].stride * scale
        self.exit = nn.Conv2d(features[-1].channels, out_channels * factor**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(factor)
        if residual:
            zero_(self.exit)

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """See :class:`Head`."""
        y: Tensor = self.shuffle(self.exit(features[-1]))
        return corrected(y, x, self.scale) if self.residual else y
