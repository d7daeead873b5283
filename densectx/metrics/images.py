"""Means over images of measures of single images, in the papers' conventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric


@final
class ImageMetrics(Metric):
    """Means over images of per-image measures, for the prediction and for a trivial baseline.

    Args:
        measures: {name: function of ((B, C, H, W), (B, C, H, W)) -> (B,)}.
        baseline: what the trivial answer is called; it is computed as ``<name>_<baseline>``.
    """

    total: Tensor
    count: Tensor
    full_state_update = False

    def __init__(self, measures: Mapping[str, Callable[[Tensor, Tensor], Tensor]], baseline: str) -> None:
        super().__init__()
        self.measures, self.baseline = dict(measures), baseline
        self.add_state("total", torch.zeros(2, len(self.measures), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, baseline: Tensor, target: Tensor) -> None:
        """(B, C, H, W) three times, in the units of the measures."""
        for row, answer in enumerate((prediction, baseline)):
            values = [measure(answer.float(), target.float()).double().sum() for measure in self.measures.values()]
            self.total[row] += torch.stack(values)
        self.count += len(target)

    def compute(self) -> dict[str, Tensor]:
        """{measure: scalar, measure_baseline: scalar}; NaN without images."""
        means = self.total / self.count
        values = dict(zip(self.measures, means[0], strict=True))
        return values | {f"{name}_{self.baseline}": value for name, value in zip(self.measures, means[1], strict=True)}


def psnr(prediction: Tensor, target: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: (B, C, H, W) twice -> (B,).

    The squared error is bounded below by 1e-10 peak^2, so equal images read 100 dB and not infinity.
    """
    error = (prediction - target).square().flatten(1).mean(1) / peak**2
    return -10 * error.clamp_min(1e-10).log10()


def quantize(x: Tensor) -> Tensor:
    """To the 256 levels of an 8-bit file: clamped to [0, 1] and rounded; how published PSNR is measured."""
    return (x.clamp(0, 1) * 255).round() / 255
