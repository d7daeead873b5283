"""Colours from a Bayer mosaic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses import Criterion
from densectx.metrics import ImageMetrics, psnr, quantize
from densectx.nn.bayer import bilinear, mosaic
from densectx.registry import HEADS
from densectx.tasks import restoring
from densectx.tasks.base import Options, Target
from densectx.types import Feature, Sample, Score, SourceInfo, Spec

BORDER = 10  # pixels that CPSNR leaves out on each side


@final
class Demosaicing(restoring.Restoring):
    """Bayer mosaic (B, 1, H, W) -> colour image (B, 3, H, W), sRGB 0..1, unclamped.

    The network sees, and corrects, the bilinear interpolation (B, 3, H, W). ``predict`` takes the mosaic as a gray
    picture; of a colour picture it reads at each place that place's colour alone, so a mosaic that is stored in
    colour gives the same answer.

    CPSNR as published: answer rounded to 8 bit, one mean squared error over the three channels, 10 pixels cropped at
    each border, mean over images, peak 255.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a data source with colour images.
        weight: of its loss.
        pattern: colours of the upper left 2x2 places, row by row.
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    score = Score("cpsnr", "bilinear")
    convention = f"8-bit RGB, crop {BORDER}, per image, peak 255"
    output = "image"
    period = 2  # of the pattern, which begins at the upper left pixel of what it is given
    turns = False

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        pattern: Literal["RGGB", "BGGR", "GRBG", "GBRG"] = "RGGB",
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        if info.channels != 3:
            raise ConfigError(f"demosaicing: source {source!r} has {info.channels} channels, colour images have 3.")
        super().__init__(source, weight, channels=3, in_channels=in_channels)
        self.pattern = pattern
        self.head = HEADS.build(head, "head", features=features, in_channels=3, out_channels=3, scale=1, residual=True)
        self.criterion = Criterion(loss, form="numbers")
        self.metrics = ImageMetrics({"cpsnr": psnr}, "bilinear")

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The bilinear picture of the image's mosaic; the image."""
        return self._interpolated(batch["image"]), {"image": restoring.masked(batch["image"], batch)}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The bilinear picture of the given mosaic."""
        return self._interpolated(image)

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """CPSNR of the answer and of the bilinear picture."""
        answers = (_cropped(image) for image in (quantize(prediction), quantize(x), target["image"]))
        restoring.measure(self.metrics, *answers)

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Bilinear, answer, truth."""
        return restoring.pictures(x, prediction, target["image"])

    def _interpolated(self, image: Tensor) -> Tensor:
        return bilinear(mosaic(image, self.pattern), self.pattern)


def _cropped(image: Tensor) -> Tensor:
    return image[..., BORDER:-BORDER, BORDER:-BORDER] if min(image.shape[-2:]) > 2 * BORDER else image
