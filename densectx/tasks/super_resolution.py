"""Single-image super-resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from densectx.errors import ConfigError, DataError
from densectx.losses import Criterion
from densectx.metrics import ImageMetrics, psnr, quantize
from densectx.nn.colour import as_rgb, luma
from densectx.nn.resize import bicubic
from densectx.registry import HEADS
from densectx.tasks.base import Target, Task
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms


@final
class SuperResolution(Task):
    """Small image (B, C, h, w) -> image ``scale`` times larger (B, C, h * scale, w * scale), sRGB 0..1, unclamped.

    The small image is MATLAB's antialiased bicubic reduction, rounded to 8 bit; the network corrects the bicubic
    enlargement. PSNR as published: answer rounded to 8 bit, MATLAB's luma (not rounded; a gray file's values as
    they are), ``scale`` pixels cropped at each border, mean over images, peak 255.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of the data source.
        weight: of its loss.
        scale: 2, 3 or 4.
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    score = Score("psnr", "bicubic")
    on_colour = "luma"
    output = "restored"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        scale: int = 2,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if scale not in (2, 3, 4):
            raise ConfigError(f"super_resolution: scale {scale} is not 2, 3 or 4.")
        if info.size is not None and min(info.size) < scale:
            raise ConfigError(f"super_resolution: images of {info.size} pixels cannot be reduced by {scale}.")
        self.scale = scale
        self.head = HEADS.build(
            head,
            "head",
            features=features,
            in_channels=info.channels,
            out_channels=info.channels,
            scale=scale,
            residual=True,
        )
        self.criterion = Criterion(loss)
        self.metrics = ImageMetrics({"psnr": psnr}, "bicubic")

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The reduced image; the image cropped (bottom, right) to a multiple of the scale."""
        height, width = (size - size % self.scale for size in batch["image"].shape[-2:])
        if not height or not width:
            raise DataError(f"an image of {tuple(batch['image'].shape[-2:])} pixels cannot be reduced by {self.scale}.")
        image = batch["image"][..., :height, :width]
        return quantize(bicubic(image, down=self.scale)), {"image": image, "gray": batch["gray"]}

    def inputs(self, image: Tensor, options: Mapping[str, float | None]) -> Tensor:
        """The given (small) image."""
        return image

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Of the enlarged image."""
        return self.criterion(output, target["image"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """The enlarged image, unclamped."""
        return output

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """PSNR on luma of the answer and of bicubic enlargement."""
        truth = target["image"]
        enlarged = bicubic(x, up=self.scale)
        for row, gray in enumerate(target["gray"].tolist()):
            answers = (y[row : row + 1] for y in (prediction, enlarged, truth))
            self.metrics.update(*(self._measured(y, gray) for y in answers))

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Bicubic, answer, truth."""
        pictures = (bicubic(x, up=self.scale), prediction, target["image"])
        return [as_rgb(picture)[0].clamp(0, 1) for picture in pictures]

    def _measured(self, image: Tensor, gray: bool) -> Tensor:
        """The channel that the literature measures, borders cropped unless nothing would be left."""
        image = quantize(image)
        y = image[:, :1] if gray or image.shape[1] == 1 else luma(image)
        s = self.scale
        return y[..., s:-s, s:-s] if min(y.shape[-2:]) > 2 * s else y
