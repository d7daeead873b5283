"""Losses of classes, pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.losses.base import Countable, Form, Loss


@final
class CrossEntropy(Loss, Countable):
    """Softmax cross-entropy of logits (B, K, H, W) and class ids (B, H, W) int64.

    Weight = the summed class weights of labelled pixels, as in ``torch.nn.functional.cross_entropy``.

    Args:
        ignore_index: id of unlabelled pixels, given by the task.
        classes: number of classes, given by the task.
        class_weights: one factor a class, or null for 1.
        label_smoothing: in [0, 1); not together with a class weight of 0.
    """

    takes = ("ids",)
    class_weights: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        classes: int | None = None,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"cross_entropy: label_smoothing {label_smoothing} is not in [0, 1).")
        if label_smoothing and class_weights is not None and 0 in class_weights:
            raise ConfigError(
                "cross_entropy: label_smoothing spreads pixels of a class with weight 0 over the others; leave such a"
                " class out by the source's remap (ignore), or set label_smoothing 0."
            )
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        # not persistent: numbers of the config, not learned
        self.register_buffer("class_weights", _factors("cross_entropy", class_weights, classes), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) float logits, (B, H, W) int64 -> (sum, weight)."""
        weights = self.class_weights
        total = F.cross_entropy(
            output,
            target,
            weights if weights is None else weights.to(output.dtype),
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return total, self.weight(target).to(total.dtype)

    def weight(self, target: Tensor) -> Tensor:
        """Summed class weights of labelled pixels."""
        return _weight_of_ids(target, self.ignore_index, self.class_weights)


@final
class Focal(Loss, Countable):
    """Focal loss: cross-entropy times (1 - p)^gamma, p the probability of the truth (Lin et al. 2017).

    Class ids (B, H, W) int64: softmax over the classes; weight = the summed class weights of labelled pixels, so that
    gamma 0 is ``cross_entropy``. Labels (B, K, H, W) float in 0..1, NaN = unlabelled: a sigmoid each, the paper's
    form; weight = number of labels. Between 0 and 1 its factor is |label - p|^gamma (Li et al. 2020, quality focal).

    Args:
        ignore_index: id of unlabelled pixels, given by the task.
        classes: number of channels, given by the task.
        form: of the target, given by the task.
        gamma: at least 0.
        class_weights: for class ids, one factor a class, or null for 1.
        alpha: for labels, factor of label 1, with 1 - alpha for label 0 (the paper: 0.25), or null for 1 and 1.
    """

    takes = ("ids", "labels")
    class_weights: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        classes: int | None = None,
        form: Form | None = None,
        gamma: float = 2.0,
        class_weights: Sequence[float] | None = None,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        if gamma < 0:
            raise ConfigError(f"focal: gamma {gamma} is negative.")
        if alpha is not None and not 0 < alpha < 1:
            raise ConfigError(f"focal: alpha {alpha} is not between 0 and 1.")
        if form == "ids" and alpha is not None:
            raise ConfigError("focal: alpha is for labels of 0 or 1; class ids take class_weights, one a class.")
        if form == "labels" and class_weights is not None:
            raise ConfigError("focal: class_weights are for class ids; labels of 0 or 1 take alpha.")
        self.ignore_index, self.gamma, self.alpha = ignore_index, gamma, alpha
        self.register_buffer("class_weights", _factors("focal", class_weights, classes), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) float logits, ids or labels -> (sum, weight)."""
        return self._labels(output, target) if target.is_floating_point() else self._ids(output, target)

    def weight(self, target: Tensor) -> Tensor:
        """Number of labels, or summed class weights of labelled pixels."""
        if target.is_floating_point():
            return (~target.isnan()).sum().to(target.dtype)
        return _weight_of_ids(target, self.ignore_index, self.class_weights)

    def _ids(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        labelled = target != self.ignore_index
        ids = target.where(labelled, 0)
        log_p = output.log_softmax(1).gather(1, ids[:, None])[:, 0]
        factor = labelled.to(output.dtype)
        if self.class_weights is not None:
            factor = factor * self.class_weights.to(output.dtype)[ids]
        return -(factor * self._power(-log_p.expm1()) * log_p).sum(), factor.sum()

    def _labels(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        labelled = ~target.isnan()
        truth = target.where(labelled, 0).to(output.dtype)
        factor = labelled.to(output.dtype)
        if self.alpha is not None:
            factor = factor * (self.alpha * truth + (1 - self.alpha) * (1 - truth))
        entropy = F.binary_cross_entropy_with_logits(output, truth, reduction="none")
        total = (factor * self._power((truth - output.sigmoid()).abs()) * entropy).sum()
        return total, labelled.sum().to(total.dtype)

    def _power(self, distance: Tensor) -> Tensor:
        # not 0: below an exponent of 1 its slope is infinite, and infinite times 0 is NaN
        return distance.clamp_min(1e-12).pow(self.gamma)


@final
class BCE(Loss, Countable):
    """Binary cross-entropy of logits and labels in 0..1, both (B, K, H, W) float; NaN = unlabelled.

    Weight = number of labels, as in ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Args:
        classes: number of channels, given by the task.
        pos_weight: factor of label 1, one for all channels or one each, or null for 1.
    """

    takes = ("labels",)
    pos_weight: Tensor | None

    def __init__(self, classes: int | None = None, pos_weight: float | Sequence[float] | None = None) -> None:
        super().__init__()
        several = isinstance(pos_weight, Sequence)
        values = list(pos_weight) if isinstance(pos_weight, Sequence) else [pos_weight]
        if several and classes not in (None, len(values)):
            raise ConfigError(f"bce: {len(values)} pos_weights for {classes} channels.")
        if pos_weight is not None and not all(value is not None and 0 < value < math.inf for value in values):
            raise ConfigError(f"bce: pos_weight {pos_weight} is not positive and finite.")
        factors = None if pos_weight is None else torch.tensor(values, dtype=torch.float32)
        self.register_buffer("pos_weight", factors, persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) float logits, (B, K, H, W) float labels -> (sum, number of labels)."""
        labelled = ~target.isnan()
        factors = None if self.pos_weight is None else self.pos_weight.to(output.dtype)[:, None, None]
        total = F.binary_cross_entropy_with_logits(
            output,
            target.where(labelled, 0).to(output.dtype),
            labelled.to(output.dtype),
            reduction="sum",
            pos_weight=factors,
        )
        return total, labelled.sum().to(total.dtype)

    def weight(self, target: Tensor) -> Tensor:
        """Number of labels."""
        return (~target.isnan()).sum().to(target.dtype)


def _weight_of_ids(target: Tensor, ignore_index: int, class_weights: Tensor | None) -> Tensor:
    """Number, or summed class weights, of labelled pixels."""
    labelled = target != ignore_index
    if class_weights is None:
        return labelled.sum().to(torch.get_default_dtype())
    return class_weights[target[labelled]].sum()


def _factors(loss: str, class_weights: Sequence[float] | None, classes: int | None) -> Tensor | None:
    if class_weights is None:
        return None
    if classes not in (None, len(class_weights)):
        raise ConfigError(f"{loss}: {len(class_weights)} class_weights for {classes} classes.")
    if not all(0 <= weight < math.inf for weight in class_weights) or not any(class_weights):
        raise ConfigError(f"{loss}: class_weights {list(class_weights)}: expected numbers from 0 up, not all 0.")
    return torch.tensor(class_weights, dtype=torch.float32)
