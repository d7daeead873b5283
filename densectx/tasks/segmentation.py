"""Semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses import Criterion, Form
from densectx.metrics import ConfusionMetrics, LabelMetrics
from densectx.nn.colour import as_rgb
from densectx.palette import voc_palette
from densectx.registry import HEADS
from densectx.tasks.base import Counting, Options, Target, Task
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms

Mode: TypeAlias = Literal["multiclass", "binary", "multilabel"]


@final
class Segmentation(Task, Counting):
    """Classes for every pixel: image (B, C, H, W) -> probabilities (B, K, H, W).

    Class names, palette and the id of unlabelled pixels come from the source and travel into the checkpoint.

    ==============  =====================================  ====================  ===========================
    mode            the source has                         the network gives     ``predict`` answers with
    ==============  =====================================  ====================  ===========================
    ``multiclass``  masks of K class ids                   K logits, softmax     (K, H, W), their sum is 1
    ``binary``      masks of 2: background, foreground     1 logit, sigmoid      (2, H, W), their sum is 1
    ``multilabel``  ``target`` (K, H, W), ``labels`` each  K logits, a sigmoid   (K, H, W), independent of
                    0 or 1, NaN = unlabelled               each                  each other
    ==============  =====================================  ====================  ===========================

    Metrics: :class:`densectx.metrics.ConfusionMetrics`, for ``multilabel`` :class:`densectx.metrics.LabelMetrics`.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a data source with masks or labels.
        weight: of its loss.
        mode: see above.
        classes: number of classes, null for what the source says; another number is refused.
        head: spec of the head.
        loss: spec of the loss, or a list of them; null for cross_entropy, in the other modes bce.
        label_stride: N to learn from the pixels (N i, N j) only; metrics look at all. With 8 and a head ``upsample``
            of method ``interp_map`` this is the loss of Yu & Koltun (2016), on the labels under their cells.
        boundary: also measure boundary IoU in bands of this width / diagonal of the picture (Cheng et al. 2021: 0.02).
    """

    requires: tuple[str, ...] = ("image", "mask")
    score = Score("miou", "majority")
    output: Literal["classes", "labels"] = "classes"
    unchanged = True
    palette: Tensor

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        mode: Mode = "multiclass",
        classes: int | None = None,
        head: Spec = "linear",
        loss: Spec | Sequence[Spec] | None = None,
        label_stride: int = 1,
        boundary: float | None = None,
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        _check_source(mode, source, info, classes)
        if boundary is not None and not 0 < boundary < 1:
            raise ConfigError(f"segmentation: boundary {boundary} is no share of the diagonal; the paper takes 0.02.")
        if label_stride < 1:
            raise ConfigError(f"segmentation: label_stride {label_stride} is not positive.")
        self.info, self.mode, self.label_stride = info, mode, label_stride
        count = len(info.classes)
        form: Form = "ids" if mode == "multiclass" else "labels"
        self.logits = 1 if mode == "binary" else count
        channels: dict[str, Any] = {"in_channels": info.channels, "out_channels": self.logits}
        self.head = HEADS.build(head, "head", features=features, exclusive=mode == "multiclass", **channels)
        if loss is None:
            loss = "cross_entropy" if form == "ids" else "bce"
        self.criterion = Criterion(loss, form=form, ignore_index=info.ignore_index, classes=self.logits)
        if mode == "multilabel":
            self.requires, self.output, self.score = ("image", "target"), "labels", Score("miou", "constant")
            self.metrics = LabelMetrics(info.classes, boundary=boundary)
        else:
            self.metrics = ConfusionMetrics(count, info.ignore_index, info.classes, boundary)
        palette = info.palette or (voc_palette(count) if mode != "multilabel" else voc_palette(count + 1)[1:])
        self.register_buffer("palette", torch.tensor(palette, dtype=torch.float32) / 255, persistent=False)

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The image itself, and the mask or the labels."""
        kept = (self.requires[1], *(["surround"] if self.label_stride > 1 and "surround" in batch else []))
        return batch["image"], {key: batch[key] for key in kept}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The image itself."""
        return image

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Logits (B, K, H, W), binary (B, 1, H, W)."""
        grid = self._grid(target)
        return self.criterion(output[grid], self._truth(target)[grid])

    def weights(self, target: Target) -> dict[str, Tensor]:
        """Of the labels on the grid."""
        return self.criterion.weights(self._truth(target)[self._grid(target)])

    def _grid(self, target: Target) -> tuple[Any, ...]:
        """Which pixels count."""
        if self.label_stride == 1:
            return (...,)
        # counted from the first pixel that is no surroundings
        first = int(target["surround"][0]) % self.label_stride if "surround" in target else 0
        return (..., slice(first, None, self.label_stride), slice(first, None, self.label_stride))

    def _truth(self, target: Target) -> Tensor:
        """The labels in the form that the losses take."""
        truth = target[self.requires[1]]
        if self.mode != "binary":
            return truth
        known = (truth == 1).to(torch.get_default_dtype())
        return known.masked_fill(truth == self.info.ignore_index, torch.nan)[:, None]

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """Probabilities (B, K, H, W)."""
        if self.mode == "multiclass":
            return output.softmax(1)
        # of the background by the sigmoid too: 1 - p would lose small numbers
        return torch.cat([(-output).sigmoid(), output.sigmoid()], 1) if self.mode == "binary" else output.sigmoid()

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """One confusion matrix over everything, or one a label."""
        self.metrics.update(prediction, target[self.requires[1]])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Image, predicted classes, true classes (unlabelled black); the mean colour of a pixel's labels."""
        image = as_rgb(x)[0]
        if self.mode == "multilabel":
            return [image, self._mix(prediction[0] >= 0.5), self._mix(target["target"][0] >= 0.5)]
        mask = target["mask"][0]
        unlabelled = mask == self.info.ignore_index
        truth = self.palette[mask.masked_fill(unlabelled, 0)].masked_fill(unlabelled[..., None], 0.0)
        answer = self.palette[prediction[0].argmax(0)]
        return [image, answer.permute(2, 0, 1), truth.permute(2, 0, 1)]

    def _mix(self, labels: Tensor) -> Tensor:
        """(K, H, W) bool -> (3, H, W)."""
        colours = torch.einsum("khw,kc->chw", labels.float(), self.palette)
        return (colours / labels.sum(0).clamp_min(1)).clamp(0, 1)


def _check_source(mode: Mode, source: str, info: SourceInfo, classes: int | None) -> None:
    count, names = len(info.classes), ", ".join(info.classes)
    if mode == "multilabel":
        if info.target != "labels" or not info.classes:
            raise ConfigError(
                f"segmentation: mode multilabel needs labels of 0 or 1 for each class as the target, but source"
                f" {source!r} has none; name a source that has, or take mode multiclass for masks of class ids."
            )
        if info.scale != 1:
            raise ConfigError(f"segmentation: the labels of source {source!r} are {info.scale} times its images' size.")
    elif "mask" not in info.keys or not info.classes:
        hint = "take mode multilabel for its labels" if info.target == "labels" else "name one that has"
        raise ConfigError(f"segmentation: source {source!r} has no masks with classes; {hint}.")
    elif mode == "binary" and count != 2:
        raise ConfigError(
            f"segmentation: mode binary needs a source of 2 classes, background and foreground, but {source!r} has"
            f" {count} ({names}); take mode multiclass."
        )
    if classes not in (None, count):
        raise ConfigError(f"segmentation: classes is {classes}, but source {source!r} has {count} ({names}).")
    if mode != "multilabel" and info.ignore_index == SourceInfo.ignore_index < count:  # nobody chose it
        raise ConfigError(
            f"segmentation: source {source!r} has {count} classes, and its ignore_index {info.ignore_index} is the id"
            f" of class {info.classes[info.ignore_index]!r}, which nothing would learn or measure; the source must give"
            f" another, such as {count}."
        )
