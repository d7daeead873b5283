"""The Lovász extension of the Jaccard loss."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from densectx.losses.base import Countable, Loss
from densectx.losses.region import images, regions


@final
class Lovasz(Loss, Countable):
    """Lovász-Softmax: a convex surrogate of 1 - IoU, mean over classes and images (Berman et al. 2018, section 3).

    Class ids (B, H, W) int64: softmax, mean over the classes an image shows. Labels (B, K, H, W) float, NaN =
    unlabelled, 1 from 0.5 on: the same of each sigmoid, mean over all labelled classes; of a class that is absent it
    is the greatest probability. Weight = number of images with labelled pixels.

    Args:
        ignore_index: id of unlabelled pixels, given by the task.
        absent: whether classes that an image does not show count; null: for labels, not for ids.
    """

    takes = ("ids", "labels")

    def __init__(self, ignore_index: int = 255, absent: bool | None = None) -> None:
        super().__init__()
        self.ignore_index, self.absent = ignore_index, absent

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) float logits, ids or labels -> (sum, number of images with labelled pixels)."""
        target = _rounded(target)
        probability, truth, labelled, counted = regions(output, target, self.ignore_index, self.absent)
        total = probability.sum() * 0
        for p, t, known, classes in zip(probability, truth, labelled, counted, strict=True):
            # image by image and only what counts: sorting is the cost
            total = total + lovasz_jaccard(p[classes], t[classes], known[classes]).sum() / classes.sum().clamp_min(1)
        return total, counted.any(1).sum().to(total.dtype)

    def weight(self, target: Tensor) -> Tensor:
        """Number of images with labelled pixels that count."""
        return images(_rounded(target), self.ignore_index, self.absent)


def _rounded(target: Tensor) -> Tensor:
    """Labels as 0 and 1, NaN where there is none; ids as they are."""
    if not target.is_floating_point():
        return target
    return (target >= 0.5).to(target.dtype).masked_fill(target.isnan(), torch.nan)


def lovasz_jaccard(probability: Tensor, truth: Tensor, labelled: Tensor) -> Tensor:
    """The Lovász extension of 1 - IoU of each row: (K, N) in 0..1, (K, N) 0 or 1, (K, N) bool -> (K,).

    Berman et al. 2018, equation 9 and algorithm 1; pixels that are not labelled do not count.
    """
    # -1: behind every labelled pixel, where it changes nothing of what stands before it
    errors, order = (truth - probability).abs().masked_fill(~labelled, -1.0).sort(dim=1, descending=True)
    ordered = truth.gather(1, order)
    positives = ordered.sum(1, keepdim=True)
    union = positives + (1 - ordered).cumsum(1)  # at least 1: without positives the first pixel is one of it
    loss = 1 - (positives - ordered.cumsum(1)) / union
    steps = torch.cat([loss[:, :1], loss[:, 1:] - loss[:, :-1]], 1)
    return (errors.clamp_min(0) * steps).sum(1)
