"""Metrics of labels that exclude each other not: a yes or no for each class and pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric

from densectx.metrics.boundary import boundary_counts
from densectx.metrics.classes import iou_values


@final
class LabelMetrics(Metric):
    """Metrics of independent labels from a 2 x 2 table a class, summed over everything.

    Computes ``iou_<name>`` of each class, ``miou`` (their mean; classes that occur neither in truth nor in prediction
    have NaN and are left out), ``pixel_accuracy`` (share of right labels), and what the best answer that is the same
    everywhere would score: ``miou_constant`` (a label everywhere where the truth has it anywhere),
    ``pixel_accuracy_constant`` (the more frequent value of each). With ``boundary`` also ``boundary_iou`` and
    ``boundary_iou_<name>`` (:mod:`densectx.metrics.boundary`). All in percent.

    Args:
        names: of the K classes.
        boundary: width of the bands along contours / diagonal of the picture (the paper: 0.02), null for none.
    """

    tables: Tensor
    bands: Tensor
    full_state_update = False

    def __init__(self, names: Sequence[str], boundary: float | None = None) -> None:
        super().__init__()
        self.names, self.boundary = tuple(names), boundary
        # by class: [truth, prediction]
        self.add_state("tables", torch.zeros(len(names), 2, 2, dtype=torch.long), dist_reduce_fx="sum")
        if boundary is not None:
            self.add_state("bands", torch.zeros(2, len(names), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """(B, K, H, W) probabilities and float labels, both a yes from 0.5 on, NaN in the labels = unlabelled."""
        for index in range(len(self.names)):
            truth, known = (target[:, index] >= 0.5).long(), ~target[:, index].isnan()
            given = (prediction[:, index] >= 0.5).long()
            self.tables[index] += torch.bincount((2 * truth + given)[known], minlength=4).view(2, 2)
            if self.boundary is not None:
                self.bands[:, index] += boundary_counts(given, truth, known, 2, self.boundary)[:, 1]

    def compute(self) -> dict[str, Tensor]:
        """{metric: scalar in percent}; NaN where nothing was labelled."""
        tables = self.tables.double()
        total, positive, hits = tables.sum((1, 2)), tables[:, 1].sum(1), tables[:, 1, 1]
        union = total - tables[:, 0, 0]
        values = {
            **iou_values("iou", "miou", self.names, hits, union),
            "pixel_accuracy": (hits + tables[:, 0, 0]).sum() / total.sum(),
            "miou_constant": (positive / total)[positive > 0].mean(),
            "pixel_accuracy_constant": torch.maximum(positive, total - positive).sum() / total.sum(),
        }
        if self.boundary is not None:
            values |= iou_values("boundary_iou", "boundary_iou", self.names, *self.bands.double())
        return {name: 100 * value for name, value in values.items()}
