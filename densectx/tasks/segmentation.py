"""Semantic segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses import Criterion
from densectx.metrics import ConfusionMetrics
from densectx.nn.colour import as_rgb
from densectx.registry import HEADS
from densectx.tasks.base import Target, Task
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms


@final
class Segmentation(Task):
    """A class for every pixel: image (B, C, H, W) -> probabilities (B, K, H, W).

    Class names, palette and the id of unlabelled pixels come from the source and travel into the checkpoint.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a data source with masks.
        weight: of its loss.
        classes: number of classes, null for what the source says; another number is refused.
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    requires = ("image", "mask")
    score = Score("miou", "majority")
    output = "classes"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        classes: int | None = None,
        head: Spec = "linear",
        loss: Spec | Sequence[Spec] = "cross_entropy",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if "mask" not in info.keys or not info.classes:
            raise ConfigError(f"segmentation: source {source!r} has no masks with classes; name one that has.")
        count = len(info.classes)
        if classes not in (None, count):
            raise ConfigError(
                f"segmentation: classes is {classes}, but source {source!r} has {count} ({', '.join(info.classes)})."
            )
        self.info = info
        self.head = HEADS.build(head, "head", features=features, in_channels=info.channels, out_channels=count)
        self.criterion = Criterion(loss, ignore_index=info.ignore_index, classes=count)
        self.metrics = ConfusionMetrics(count, info.ignore_index)
        palette = info.palette or default_palette(count)
        self.register_buffer("palette", torch.tensor(palette, dtype=torch.float32) / 255, persistent=False)

    palette: Tensor

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The image itself, and the mask."""
        return batch["image"], {"mask": batch["mask"]}

    def inputs(self, image: Tensor, options: Mapping[str, float | None]) -> Tensor:
        """The image itself."""
        return image

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Logits (B, K, H, W)."""
        return self.criterion(output, target["mask"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """Class probabilities (B, K, H, W)."""
        return output.softmax(1)

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """One confusion matrix over everything."""
        self.metrics.update(prediction, target["mask"])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Image, predicted classes, true classes (unlabelled black)."""
        mask = target["mask"][0]
        unlabelled = mask == self.info.ignore_index
        truth = self.palette[mask.masked_fill(unlabelled, 0)].masked_fill(unlabelled[..., None], 0.0)
        answer = self.palette[prediction[0].argmax(0)]
        return [as_rgb(x[:, :3])[0], answer.permute(2, 0, 1), truth.permute(2, 0, 1)]


def default_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """PASCAL VOC's colour of each class id: bits of the id spread over the channels."""
    return tuple(
        (
            sum((i >> (3 * b) & 1) << (7 - b) for b in range(8)),
            sum((i >> (3 * b + 1) & 1) << (7 - b) for b in range(8)),
            sum((i >> (3 * b + 2) & 1) << (7 - b) for b in range(8)),
        )
        for i in range(count)
    )
