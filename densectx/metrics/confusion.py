"""Segmentation metrics from one confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric

from densectx.metrics.boundary import boundary_counts
from densectx.metrics.classes import iou_values


@final
class ConfusionMetrics(Metric):
    """Segmentation metrics from one confusion matrix summed over everything (the papers' mIoU).

    Computes ``miou`` (classes that occur neither in truth nor in prediction are left out of the mean),
    ``frequency_iou`` (weighted by the pixels of each class in the truth), ``pixel_accuracy``, ``class_accuracy`` (mean
    over the classes in the truth), and what the answer "majority class everywhere" would score: ``miou_majority``,
    ``pixel_accuracy_majority``. With names also ``iou_<name>`` of each class, NaN for one that is left out. With
    ``boundary`` also ``boundary_iou`` and, with names, ``boundary_iou_<name>`` (:mod:`densectx.metrics.boundary`),
    from sums over the whole set. All in percent.

    Args:
        classes: K.
        ignore_index: id of unlabelled pixels, which do not count.
        names: of the classes.
        boundary: width of the bands along contours / diagonal of the picture (the paper: 0.02), null for none.
    """

    confusion: Tensor
    bands: Tensor
    full_state_update = False

    def __init__(
        self, classes: int, ignore_index: int, names: Sequence[str] = (), boundary: float | None = None
    ) -> None:
        super().__init__()
        self.classes, self.ignore_index, self.names, self.boundary = classes, ignore_index, tuple(names), boundary
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.long), dist_reduce_fx="sum")
        if boundary is not None:
            self.add_state("bands", torch.zeros(2, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """(B, K, H, W) scores or (B, H, W) ids, and (B, H, W) int64 ids."""
        ids = prediction.argmax(1) if prediction.ndim == 4 else prediction
        labelled = target != self.ignore_index
        index = target[labelled] * self.classes + ids[labelled]
        self.confusion += torch.bincount(index, minlength=self.classes**2).view(self.classes, self.classes)
        if self.boundary is not None:
            self.bands += boundary_counts(ids, target, labelled, self.classes, self.boundary)

    def compute(self) -> dict[str, Tensor]:
        """{metric: scalar in percent}; NaN where nothing was labelled."""
        matrix = self.confusion.double()
        hits, truth, predicted, total = matrix.diagonal(), matrix.sum(1), matrix.sum(0), matrix.sum()
        union = truth + predicted - hits
        majority = truth.max() / total
        values = {
            **iou_values("iou", "miou", self.names, hits, union),
            "frequency_iou": (truth * hits / union)[truth > 0].sum() / total,
            "pixel_accuracy": hits.sum() / total,
            "class_accuracy": (hits / truth)[truth > 0].mean(),
            "miou_majority": majority / (truth > 0).sum(),
            "pixel_accuracy_majority": majority,
        }
        if self.boundary is not None:
            values |= iou_values("boundary_iou", "boundary_iou", self.names, *self.bands.double())
        return {name: 100 * value for name, value in values.items()}
