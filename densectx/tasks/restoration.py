"""Restoration from pairs of pictures: degraded and clean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from densectx.losses import Criterion
from densectx.metrics import quantize
from densectx.registry import HEADS
from densectx.tasks import restoring
from densectx.tasks.base import Options, Target
from densectx.types import Feature, Sample, Score, SourceInfo, Spec


@final
class Restoration(restoring.Restoring):
    """Degraded picture (B, C, H, W) -> clean picture (B, C, H, W), sRGB 0..1, unclamped.

    For degradations that no formula gives (rain, blur, a camera's noise): the source delivers both pictures,
    ``image`` degraded and ``target`` clean; the network corrects the first.

    PSNR and SSIM: answer rounded to 8 bit, whole image, mean over the images that have a target.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a data source of pairs of one size.
        weight: of its loss.
        cutblur: probability of CutBlur in training (:func:`densectx.tasks.restoring.cutblur`).
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    requires = ("image", "target")
    score = Score("psnr", "input")
    on_colour = "per_channel"
    output = "restored"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        cutblur: float = 0.0,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        restoring.check_pairs("restoration", source, info, 1)
        self.cutblur = restoring.chance("restoration: cutblur", cutblur)
        self.unchanged = not self.cutblur
        self.convention = f"8-bit {restoring.colours(info.channels)}, whole image, per image, peak 255"
        self.head = HEADS.build(
            head,
            "head",
            features=features,
            in_channels=info.channels,
            out_channels=info.channels,
            scale=1,
            residual=True,
        )
        self.criterion = Criterion(loss, form="numbers")
        self.metrics = restoring.restored_metrics("input")

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The degraded picture (itself, unless CutBlur changes it); the clean one, NaN where there is none."""
        x, clean = batch["image"], restoring.paired_target(batch)
        if self.training and self.cutblur:
            x = restoring.cutblur(x, clean.where(clean.isfinite(), x), rngs, self.cutblur)
        return x, {"image": restoring.masked(clean, batch)}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The given picture."""
        return image

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """Of the answer and of the input."""
        restoring.measure(self.metrics, quantize(prediction), x, target["image"])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Input, answer, truth."""
        return restoring.pictures(x, prediction, target["image"])
