"""Boundary detection for densectx: a task, its loss and its metric in one file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from densectx import HEADS
from densectx.errors import ConfigError, DataError
from densectx.losses import Countable, Criterion, Loss
from densectx.nn.colour import as_rgb
from densectx.tasks.base import Counting, Options, Target, Task
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms


def split(target: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Share of annotators, any shape, NaN = unlabelled -> (boundary, no boundary); what few marked is neither."""
    return target >= threshold, target == 0


@final
class BalancedBCE(Loss, Countable):
    """Cross-entropy in which boundary and other pixels of an image weigh the same (Xie & Tu 2015, equation 2)."""

    takes = ("labels",)

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and shares, (B, 1, H, W) -> (sum, sum of the pixels' weights); (0, 0) without both kinds."""
        edge, weights = self._weights(target)
        total = F.binary_cross_entropy_with_logits(output.float(), edge.float(), weights, reduction="sum")
        return total, weights.sum()

    def weight(self, target: Tensor) -> Tensor:
        """Sum of the pixels' weights."""
        return self._weights(target)[1].sum()

    def _weights(self, target: Tensor) -> tuple[Tensor, Tensor]:
        edge, other = split(target, self.threshold)
        edges, others = (kind.sum((1, 2, 3), keepdim=True) for kind in (edge, other))
        return edge, (edge * others + other * edges) / (edges + others).clamp_min(1)


@final
class BoundaryMetrics(Metric):
    """Average precision ``ap``, and that of a constant answer, ``ap_constant``, in percent.

    Over all pixels of all images, without the benchmark's thinning and tolerance: lower than published figures.
    """

    counts: Tensor
    full_state_update = False

    def __init__(self, bins: int = 1000) -> None:
        super().__init__()
        self.bins = bins  # of the probability: thresholds are k / bins
        self.add_state("counts", torch.zeros(2, bins, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, edge: Tensor, other: Tensor) -> None:
        """Probabilities and two masks of the same shape."""
        bins = (prediction * self.bins).long().clamp_max(self.bins - 1)
        self.counts += torch.stack([bins[kind].bincount(minlength=self.bins) for kind in (other, edge)])

    def compute(self) -> dict[str, Tensor]:
        """{metric: scalar}; NaN without boundaries."""
        falling = self.counts.flip(1).cumsum(1).double()
        hits, marked = falling[1], falling.sum(0)
        recall, precision = hits / hits[-1], hits / marked.clamp_min(1)
        ap = (recall.diff(prepend=recall.new_zeros(1)) * precision).sum()
        return {"ap": 100 * ap, "ap_constant": 100 * hits[-1] / marked[-1]}


@final
class Edges(Task, Counting):
    """Probability that people see a boundary: image (B, C, H, W) -> (B, 1, H, W).

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a source whose ``target`` is a map of one channel, the share of annotators (BSDS500), NaN where
            unlabelled.
        weight: of its loss.
        threshold: share that makes a boundary pixel; what fewer marked counts in neither loss nor metric (Liu et
            al. 2017). Annotators rarely hit the same pixel: of BSDS500's, 6 % are marked, 2 % reach 0.3, 0.7 % 0.5.
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    requires = ("image", "target")
    score = Score("ap", "constant")
    unchanged = True

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        threshold: float = 0.3,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "balanced_bce",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if info.target != "map" or info.scale != 1:
            raise ConfigError(f"edges: source {source!r} has no map of boundaries of its images' size as the target.")
        if not 0 < threshold <= 1:
            raise ConfigError(f"edges: threshold {threshold} is not in (0, 1].")
        self.threshold = threshold
        self.head = HEADS.build(head, "head", features=features, in_channels=info.channels, out_channels=1, scale=1)
        self.criterion = Criterion(loss, form="labels", threshold=threshold)
        self.metrics = BoundaryMetrics()

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The image itself, and the share of annotators.

        Raises:
            DataError: the target has more than one channel.
        """
        target = batch["target"]
        if target.shape[1] != 1:
            raise DataError(
                f"edges: the target of source {self.source!r} has {target.shape[1]} channels, expected one, the share"
                " of annotators."
            )
        return batch["image"], {"share": target}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The image itself."""
        return image

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Of logits (B, 1, H, W)."""
        return self.criterion(output, target["share"])

    def weights(self, target: Target) -> dict[str, Tensor]:
        """Of the share of annotators."""
        return self.criterion.weights(target["share"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """Probabilities (B, 1, H, W)."""
        return output.float().sigmoid()

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """Count the labelled pixels."""
        self.metrics.update(prediction, *split(target["share"], self.threshold))

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Image, answer, share of annotators."""
        return [as_rgb(picture)[0] for picture in (x, prediction, target["share"].nan_to_num())]
