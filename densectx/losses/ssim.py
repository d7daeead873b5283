"""A loss of structure: one minus the structural similarity."""

from __future__ import annotations

from typing import final

from torch import Tensor
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.losses.base import Countable, Loss
from densectx.metrics.ssim import ssim_map, window_size
from densectx.nn.precision import full, no_autocast


@final
class SSIM(Loss, Countable):
    """1 - SSIM of each image (Zhao et al. 2017, eq. 7), with the metric's window (:mod:`densectx.metrics.ssim`).

    The mean over the windows of an image without an unlabelled element (NaN in the target) in their channel. Weight =
    the number of images that have such a window: a region loss, a mean over images and not over pixels.

    Args:
        peak: largest value of the data.
    """

    takes = ("numbers",)

    def __init__(self, peak: float = 1.0) -> None:
        super().__init__()
        if peak <= 0:
            raise ConfigError(f"ssim: peak {peak} must be positive.")
        self.peak = peak

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float twice, NaN = unlabelled -> (sum over images, number of images), float32."""
        with no_autocast(output.device):
            output, target = full(output), full(target)
            unlabelled = target.isnan()
            # zeros on both sides before the filter: a NaN behind it would poison the gradient
            x, y = output.masked_fill(unlabelled, 0.0), target.masked_fill(unlabelled, 0.0)
            whole = _whole(target)
            windows = whole.flatten(1).sum(1)
            similarity = (ssim_map(x, y, self.peak) * whole).flatten(1).sum(1) / windows.clamp_min(1)
            measured = (windows > 0).to(x.dtype)
            return ((1 - similarity) * measured).sum(), measured.sum()

    def weight(self, target: Tensor) -> Tensor:
        """Number of images with a window that has no unlabelled element."""
        return (_whole(full(target)).flatten(1).sum(1) > 0).sum().to(target.dtype)


def _whole(target: Tensor) -> Tensor:
    """1 for each window without NaN, else 0."""
    return 1 - F.max_pool2d(target.isnan().to(target.dtype), window_size(target), stride=1)
