"""Metrics in the papers' conventions, with sum states only: exact over any number of batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric


@final
class ConfusionMetrics(Metric):
    """Segmentation metrics from one confusion matrix summed over everything (the papers' mIoU).

    Computes ``miou`` (classes that occur neither in truth nor in prediction are left out of the mean),
    ``pixel_accuracy``, ``class_accuracy``, and what the answer "majority class everywhere" would score:
    ``miou_majority``, ``pixel_accuracy_majority``. All in percent.

    Args:
        classes: K.
        ignore_index: id of unlabelled pixels, which do not count.
    """

    confusion: Tensor
    full_state_update = False

    def __init__(self, classes: int, ignore_index: int) -> None:
        super().__init__()
        self.classes, self.ignore_index = classes, ignore_index
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """(B, K, H, W) scores or (B, H, W) ids, and (B, H, W) int64 ids."""
        ids = prediction.argmax(1) if prediction.ndim == 4 else prediction
        labelled = target != self.ignore_index
        index = target[labelled] * self.classes + ids[labelled]
        self.confusion += torch.bincount(index, minlength=self.classes**2).view(self.classes, self.classes)

    def compute(self) -> dict[str, Tensor]:
        """{metric: scalar in percent}; NaN where nothing was labelled."""
        matrix = self.confusion.double()
        hits, truth, predicted, total = matrix.diagonal(), matrix.sum(1), matrix.sum(0), matrix.sum()
        union = truth + predicted - hits
        majority = truth.max() / total
        values = {
            "miou": (hits / union)[union > 0].mean(),
            "pixel_accuracy": hits.sum() / total,
            "class_accuracy": (hits / truth)[truth > 0].mean(),
            "miou_majority": majority / (truth > 0).sum(),
            "pixel_accuracy_majority": majority,
        }
        return {name: 100 * value for name, value in values.items()}


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
