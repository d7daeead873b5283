"""Colorization by regression of chroma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses import Criterion
from densectx.metrics import ImageMetrics, psnr
from densectx.nn.colour import as_rgb, lab_to_rgb, rgb_to_lab
from densectx.registry import HEADS
from densectx.tasks.base import Target, Task
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms

AB_SCALE = 110.0  # chroma in units of about 1; Zhang et al. 2016 use the same number


@final
class Colorization(Task):
    """Lightness (B, 1, H, W) of an image -> colour image (B, 3, H, W), sRGB 0..1.

    The network sees L / 100 of CIE Lab only and answers (a, b) / 110; the answer keeps the input's L.
    ``ab_psnr``: PSNR in dB over both chroma channels, peak 255 (units of Lab), mean over images; ``psnr``: of RGB;
    ``gray`` is the answer a = b = 0.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a data source with colour images.
        weight: of its loss.
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    score = Score("ab_psnr", "gray")
    output = "image"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        super().__init__(source, weight, channels=1, in_channels=in_channels)
        if info.channels != 3:
            raise ConfigError(f"colorization: source {source!r} has {info.channels} channels, colour images have 3.")
        self.head = HEADS.build(head, "head", features=features, in_channels=1, out_channels=2)
        self.criterion = Criterion(loss)
        self.metrics = ImageMetrics({"ab_psnr": _ab_psnr, "psnr": _rgb_psnr}, "gray")

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """L / 100; (a, b) / 110, NaN where the file is gray (there is no colour to learn)."""
        lab = rgb_to_lab(batch["image"])
        chroma = lab[:, 1:] / AB_SCALE
        known = ~batch["gray"].view(-1, 1, 1, 1)
        return lab[:, :1] / 100, {"ab": torch.where(known, chroma, torch.nan)}

    def inputs(self, image: Tensor, options: Mapping[str, float | None]) -> Tensor:
        """The lightness of the given image; its colours are not looked at."""
        return rgb_to_lab(as_rgb(image))[:, :1] / 100

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Of (a, b) / 110."""
        return self.criterion(output, target["ab"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """L of the input with the answered chroma, as sRGB."""
        return lab_to_rgb(torch.cat([x * 100, output * AB_SCALE], 1))

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """Chroma and colour error of the answer and of gray; gray files do not count."""
        colour = ~target["ab"].isnan().flatten(1).any(1)
        if colour.any():
            lightness = x[colour] * 100
            truth = torch.cat([lightness, target["ab"][colour] * AB_SCALE], 1)
            gray = torch.cat([lightness, torch.zeros_like(truth[:, 1:])], 1)
            self.metrics.update(rgb_to_lab(prediction[colour]), gray, truth)

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Lightness, answer, truth."""
        lightness = x * 100
        chroma = target["ab"].nan_to_num() * AB_SCALE
        flat = torch.cat([lightness, torch.zeros_like(chroma)], 1)
        return [lab_to_rgb(flat)[0], prediction[0], lab_to_rgb(torch.cat([lightness, chroma], 1))[0]]


def _ab_psnr(lab: Tensor, truth: Tensor) -> Tensor:
    return psnr(lab[:, 1:], truth[:, 1:], peak=255.0)


def _rgb_psnr(lab: Tensor, truth: Tensor) -> Tensor:
    return psnr(lab_to_rgb(lab), lab_to_rgb(truth))
