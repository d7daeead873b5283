"""Errors of dense numbers: pooled over all pixels, and image by image."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric


@final
class RegressionMetrics(Metric):
    """Mean absolute and root mean squared error in the unit of the target, by two rules that differ.

    ``mae``, ``rmse``: pooled, every known value of the set counts the same. ``mae_per_image``, ``rmse_per_image``:
    of each image over its known values, then the mean over the images that have any. ``rmse_constant``: pooled error
    of the best answer that does not look at the image, which is the mean of the evaluated truth in each channel; no
    constant, such as the mean of the training set, does better.

    Args:
        channels: K.
    """

    sums: Tensor
    images: Tensor
    full_state_update = False

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        # by channel: known values, sum of the truth and of its square, of the absolute and of the squared error
        self.add_state("sums", torch.zeros(5, channels, dtype=torch.float64), dist_reduce_fx="sum")
        # number of images, sum of their mean absolute and root mean squared errors
        self.add_state("images", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """(B, K, H, W) twice, NaN in the target = unknown."""
        known = ~target.isnan()
        truth = torch.where(known, target, 0.0).double()
        error = torch.where(known, prediction - target, 0.0).double()
        parts = torch.stack([known.double(), truth, truth.square(), error.abs(), error.square()]).flatten(3).sum(3)
        self.sums += parts.sum(1)
        count, _, _, absolute, squared = parts.sum(2)
        some, count = count > 0, count.clamp_min(1)
        self.images += torch.stack([some.double(), absolute / count, (squared / count).sqrt()]).sum(1)

    def compute(self) -> dict[str, Tensor]:
        """{metric: scalar}; NaN where nothing was known."""
        count, truth, square, absolute, squared = self.sums
        spread = (square - truth.square() / count.clamp_min(1)).clamp_min(0)
        total, (images, mae, rmse) = count.sum(), self.images
        return {
            "mae": absolute.sum() / total,
            "rmse": (squared.sum() / total).sqrt(),
            "mae_per_image": mae / images,
            "rmse_per_image": rmse / images,
            "rmse_constant": (spread.sum() / total).sqrt(),
        }
