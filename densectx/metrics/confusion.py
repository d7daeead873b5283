"""Segmentation metrics from one confusion matrix."""

from __future__ import annotations

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
