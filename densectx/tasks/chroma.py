"""The two ways to answer with chroma: two numbers a pixel, or a distribution over bins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.nn.ab_bins import BINS, AbBins
from densectx.nn.precision import full, no_autocast
from densectx.nn.resize import upsample

AB_SCALE = 110.0  # chroma in units of about 1; Zhang et al. 2016 use the same number


class Chroma(nn.Module, ABC):
    """What a head's full-size output (B, ``channels``, H, W) means.

    Attributes:
        channels: that the head gives.
    """

    channels: int

    @abstractmethod
    def compared(self, output: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        """What the loss compares, from the output and the true (B, 2, H, W) in units of Lab, NaN = unlabelled."""

    @abstractmethod
    def ab(self, output: Tensor) -> Tensor:
        """The answer (B, 2, H, W), units of Lab."""


@final
class Numbers(Chroma):
    """(a, b) / 110, for a loss of numbers."""

    channels = 2

    def compared(self, output: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        """Both in units of 110."""
        return output, ab / AB_SCALE

    def ab(self, output: Tensor) -> Tensor:
        """(a, b)."""
        return output * AB_SCALE


@final
class Bins(Chroma):
    """A distribution over 313 bins for every cell of ``stride`` x ``stride`` pixels (Zhang et al. 2016).

    313 logits a pixel would be 660 MB for 8 images of 256 x 256, before the gradient. The paper has them at stride 4;
    here any head gives ``width`` channels at full size, their mean over each cell (over what of it lies in the image)
    goes through a 1x1 convolution to the logits, in float32, and the target is the mean colour of the cell's labelled
    pixels. Averaging and the convolution commute: it is the 313-channel head of rank ``width`` averaged over cells,
    without its memory. The answer is the annealed mean of a cell, enlarged bilinearly.

    Args:
        stride: side of a cell in pixels; 4 in the paper.
        width: channels of the head, at most 313 in rank.
        temperature: T of the annealed mean, in (0, 1]; 0.38 in the paper, 1 is the plain mean, towards 0 the mode.

    Raises:
        ConfigError: an option out of its range.
    """

    def __init__(self, stride: int = 4, width: int = 64, temperature: float = 0.38) -> None:
        super().__init__()
        if min(stride, width) < 1 or not 0 < temperature <= 1:
            raise ConfigError(
                f"colorization: stride {stride} and width {width} must be positive, temperature {temperature} in"
                " (0, 1] (0.38 in the paper)."
            )
        self.stride, self.channels, self.temperature = stride, width, temperature
        self.bins = AbBins()
        self.classifier = nn.Conv2d(width, BINS, 1)

    def compared(self, output: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 313, h, w) and the cells' mean colours (B, 2, h, w), NaN where a cell has no labelled pixel."""
        known = ~ab.isnan()
        mean = self._cells(torch.where(known, ab, 0.0)) / self._cells(known.to(ab.dtype))  # 0 / 0: NaN
        return self.logits(output), mean

    def ab(self, output: Tensor) -> Tensor:
        """The annealed means, enlarged and cropped."""
        with no_autocast(output.device):
            answer = upsample(self.bins.decode(self.logits(output), self.temperature), self.stride)
        return answer[..., : output.shape[-2], : output.shape[-1]]

    def logits(self, output: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, 313, H / stride, W / stride), rounded up."""
        with no_autocast(output.device):
            logits: Tensor = self.classifier(self._cells(full(output)))
            return logits

    def _cells(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
