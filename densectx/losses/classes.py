"""Losses of class ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.losses.base import Loss


@final
class CrossEntropy(Loss):
    """Softmax cross-entropy of logits (B, K, H, W) and class ids (B, H, W) int64.

    Weight = the summed class weights of labelled pixels, as in ``torch.nn.functional.cross_entropy``.

    Args:
        ignore_index: id of unlabelled pixels, given by the task.
        classes: number of classes, given by the task.
        class_weights: one factor a class, or null for 1.
        label_smoothing: in [0, 1).
    """

    class_weights: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        classes: int | None = None,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if class_weights is not None and classes not in (None, len(class_weights)):
            raise ConfigError(f"cross_entropy: {len(class_weights)} class_weights for {classes} classes.")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"cross_entropy: label_smoothing {label_smoothing} is not in [0, 1).")
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        # not persistent: a number of the config, not learned
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) float logits, (B, H, W) int64 -> (sum, weight)."""
        weights = self.class_weights
        total = F.cross_entropy(
            output,
            target,
            weights,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        labelled = target != self.ignore_index
        weight = labelled.sum() if weights is None else weights[target[labelled]].sum()
        return total, weight.to(total.dtype)
