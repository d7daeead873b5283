"""The plainest heads: per-cell linear maps and bilinear upsampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

from torch import Tensor, nn

from densectx.errors import ConfigError
from densectx.heads.base import Head
from densectx.heads.correction import corrected, zero_
from densectx.nn.precision import full
from densectx.nn.resize import deconvolution, log_interp_map, upsample
from densectx.types import Feature


@final
class Linear(Head):
    """Dropout, 1x1 convolution on the context features, bilinear upsampling to full size.

    (B, C, H / s, W / s) -> (B, out_channels, H * scale, W * scale).

    Args:
        features: given by the model.
        out_channels: given by the task.
        scale: given by the task.
        residual: given by the task; adds the (bicubically enlarged) input, and starts at zero.
        dropout: probability in [0, 1), on whole channels.

    Raises:
        ConfigError: a dropout out of range.
    """

    reads_pyramid = False

    def __init__(
        self,
        features: Sequence[Feature],
        out_channels: int,
        scale: int = 1,
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"head 'linear': dropout {dropout} is not in [0, 1).")
        self.factor, self.scale, self.residual = features[-1].stride * scale, scale, residual
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(features[-1].channels, out_channels, 1)
        if residual:
            zero_(self.conv)

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """See :class:`Head`."""
        y = upsample(self.conv(self.dropout(features[-1])), self.factor)
        return corrected(y, x, self.scale) if self.residual else y


@final
class Upsample(Head):
    """Upsampling alone, no parameters: the context module's channels are the answer (the paper's networks).

    Args:
        features: given by the model; the last level's channels must equal ``out_channels``.
        out_channels: given by the task.
        scale: given by the task.
        method: ``bilinear`` (half-pixel aligned); ``deconvolution``, the same as a fixed transposed convolution that
            fades at the borders (Dilation10, DRN); ``interp_map``, of class probabilities with cell i at pixel 8 i
            (Dilation7 and 8): the output is the logarithm of interpolated probabilities, so that softmax returns them
            and a loss at pixels 8 i is that of the cells.
        exclusive: given by the task.

    Raises:
        ConfigError: other channels than the task's, another method, a factor or a task that the method is not for.
    """

    reads_pyramid = False

    def __init__(
        self,
        features: Sequence[Feature],
        out_channels: int,
        scale: int = 1,
        method: Literal["bilinear", "deconvolution", "interp_map"] = "bilinear",
        exclusive: bool = False,
    ) -> None:
        super().__init__()
        if features[-1].channels != out_channels:
            raise ConfigError(
                f"head 'upsample' has no weights: the context's {features[-1].channels} channels must equal the"
                f" task's {out_channels}; set model.projection.channels to {out_channels}, or take head 'linear'."
            )
        self.factor, self.method = features[-1].stride * scale, method
        if method not in ("bilinear", "deconvolution", "interp_map"):
            raise ConfigError(f"head 'upsample': method {method!r} is not bilinear, deconvolution or interp_map.")
        if method == "interp_map" and not exclusive:
            raise ConfigError(
                "head 'upsample': interp_map is for classes of which each pixel has one (segmentation, mode"
                " multiclass), not for this task; take bilinear."
            )
        if method == "deconvolution" and self.factor % 2:
            raise ConfigError(f"head 'upsample': deconvolution needs an even factor, not {self.factor}; take bilinear.")

    def forward(self, features: Sequence[Tensor], x: Tensor) -> Tensor:
        """See :class:`Head`."""
        if self.method == "interp_map":
            return log_interp_map(full(features[-1]).log_softmax(1), self.factor)
        return (
            deconvolution(features[-1], self.factor)
            if self.method == "deconvolution"
            else upsample(features[-1], self.factor)
        )
