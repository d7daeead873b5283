"""Losses of regions: overlaps of each class over the whole picture."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses.base import Countable, Loss


class Regions(NamedTuple):
    """Logits and a target of either form as regions, one a class; N = H * W.

    Attributes:
        probability: (B, K, N), 0 where unlabelled.
        truth: (B, K, N) in 0..1, 0 where unlabelled.
        labelled: (B, K, N) bool.
        counted: (B, K) bool, the classes that count in an image: those that occur in its labelled pixels, and with
            ``absent`` the others of which a pixel is labelled.
    """

    probability: Tensor
    truth: Tensor
    labelled: Tensor
    counted: Tensor


def regions(output: Tensor, target: Tensor, ignore_index: int, absent: bool | None = None) -> Regions:
    """Logits (B, K, H, W) beside class ids (B, H, W) int64 (softmax) or labels (B, K, H, W) float (sigmoid).

    Args:
        output: logits.
        target: ids with ``ignore_index``, or labels in 0..1 with NaN where unlabelled.
        ignore_index: id of unlabelled pixels.
        absent: whether classes that an image does not show count; null: not for ids (another class takes their
            probability), but for labels (nothing else would lower it).
    """
    if target.is_floating_point():
        probability, labelled = output.sigmoid(), ~target.isnan()
        truth = target.where(labelled, 0).to(output.dtype)
    else:
        probability = output.softmax(1)
        labelled = (target != ignore_index)[:, None].expand_as(output)
        ids = torch.arange(output.shape[1], device=output.device)[:, None, None]
        truth = ((target[:, None] == ids) & labelled).to(output.dtype)
    if absent is None:
        absent = target.is_floating_point()
    labelled, truth = labelled.flatten(2), truth.flatten(2)
    counted = labelled.any(2) if absent else (truth > 0).any(2)
    return Regions(probability.flatten(2).where(labelled, 0), truth, labelled, counted)


def images(target: Tensor, ignore_index: int, absent: bool | None = None) -> Tensor:
    """How many images have a class that :func:`regions` counts; arguments as there."""
    if not target.is_floating_point():  # whatever is labelled shows its class
        return (target != ignore_index).flatten(1).any(1).sum().to(torch.get_default_dtype())
    counts = target > 0 if absent is False else ~target.isnan()
    return counts.flatten(1).any(1).sum().to(target.dtype)


def mean_over_classes(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's mean over its counted classes: (B, K), (B, K) bool -> (sum over images, number of images)."""
    numbers = counted.sum(1)
    means = values.where(counted, 0).sum(1) / numbers.clamp_min(1)
    return means.sum(), (numbers > 0).sum().to(values.dtype)


class _Overlap(Loss, Countable):
    """Mean over images of the mean over their classes of what an overlap lacks.

    Args:
        smooth: added to both sides of the fraction, in pixels; at least 0.
        absent: see :func:`regions`.
        ignore_index: id of unlabelled pixels.
    """

    takes = ("ids", "labels")

    def __init__(self, smooth: float, absent: bool | None, ignore_index: int) -> None:
        super().__init__()
        if smooth < 0:
            raise ConfigError(f"smooth {smooth} is negative.")
        self.smooth, self.absent, self.ignore_index = smooth, absent, ignore_index

    @abstractmethod
    def lack(self, hits: Tensor, wrong: Tensor, missed: Tensor) -> Tensor:
        """1 - overlap: (B, K) soft counts of true positives, false positives, false negatives -> (B, K)."""

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) float logits, ids or labels -> (sum, number of images with labelled pixels)."""
        probability, truth, _, counted = regions(output, target, self.ignore_index, self.absent)
        # min, not the product: the same for 0 and 1, and least at p = label between them (Wang et al. 2023)
        hits = torch.minimum(probability, truth).sum(2)
        lack = self.lack(hits, probability.sum(2) - hits, truth.sum(2) - hits)
        return mean_over_classes(lack, counted)

    def weight(self, target: Tensor) -> Tensor:
        """Number of images with labelled pixels that count."""
        return images(target, self.ignore_index, self.absent)


@final
class Dice(_Overlap):
    """Soft Dice loss, 1 - (2 TP + s) / (2 TP + FP + FN + s) of each class and image (Milletari et al. 2016).

    Class ids (B, H, W) int64: softmax, mean over the classes an image shows. Labels (B, K, H, W) float in 0..1, NaN =
    unlabelled: a sigmoid each, mean over all labelled classes. Weight = number of images with labelled pixels.

    Where probabilities are near 0 or 1 its gradient vanishes, and a label given everywhere can stay so: add ``bce``,
    ``focal`` or ``cross_entropy``.

    Args:
        ignore_index: id of unlabelled pixels, given by the task.
        smooth: s, in pixels; keeps the loss of an absent class smooth near 0.
        absent: whether classes that an image does not show count; null: for labels, not for ids.
    """

    def __init__(self, ignore_index: int = 255, smooth: float = 1.0, absent: bool | None = None) -> None:
        super().__init__(smooth, absent, ignore_index)

    def lack(self, hits: Tensor, wrong: Tensor, missed: Tensor) -> Tensor:
        """(FP + FN) / (2 TP + FP + FN + s)."""
        return (wrong + missed) / (2 * hits + wrong + missed + self.smooth).clamp_min(1e-7)


@final
class Tversky(_Overlap):
    """Tversky loss, (1 - (TP + s) / (TP + alpha FP + beta FN + s))^exponent of each class and image.

    Salehi et al. 2017; with an exponent Abraham & Khan 2019 (theirs: 0.75). alpha = beta = 0.5 is Dice, 1 is Jaccard.
    Targets, classes and weight as ``dice``.

    Args:
        ignore_index: id of unlabelled pixels, given by the task.
        alpha: factor of false positives.
        beta: factor of false negatives.
        exponent: of the focal form, 1 for none.
        smooth: s, in pixels.
        absent: whether classes that an image does not show count; null: for labels, not for ids.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        alpha: float = 0.3,
        beta: float = 0.7,
        exponent: float = 1.0,
        smooth: float = 1.0,
        absent: bool | None = None,
    ) -> None:
        super().__init__(smooth, absent, ignore_index)
        if alpha < 0 or beta < 0 or alpha + beta == 0 or exponent <= 0:
            raise ConfigError(
                f"tversky: alpha {alpha} and beta {beta} must be at least 0 and not both 0,"
                f" exponent {exponent} positive."
            )
        self.alpha, self.beta, self.exponent = alpha, beta, exponent

    def lack(self, hits: Tensor, wrong: Tensor, missed: Tensor) -> Tensor:
        """((alpha FP + beta FN) / (TP + alpha FP + beta FN + s))^exponent."""
        errors = self.alpha * wrong + self.beta * missed
        lack = errors / (hits + errors + self.smooth).clamp_min(1e-7)
        # not 0: below an exponent of 1 its slope is infinite, and infinite times 0 is NaN
        return lack if self.exponent == 1 else lack.clamp_min(1e-7).pow(self.exponent)
