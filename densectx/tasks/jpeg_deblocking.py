"""Removal of what JPEG compression leaves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses import Criterion
from densectx.metrics import quantize
from densectx.registry import HEADS
from densectx.tasks import restoring
from densectx.tasks.base import Options, Target
from densectx.types import Feature, Sample, Score, SourceInfo, Spec


@final
class JpegDeblocking(restoring.Restoring):
    """Picture from a JPEG file (B, C, H, W) -> the picture before (B, C, H, W), sRGB 0..1, unclamped.

    Images are compressed in memory, exactly as a file would be, on the CPU: rounded to 8 bit, colour with its chroma
    at half resolution, gray (a gray file or source) as gray JPEG. The network is not told the quality.

    PSNR and SSIM as published: answer rounded to 8 bit, whole image, mean over images.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a data source with 1 or 3 channels.
        weight: of its loss.
        quality: of the JPEG library, 1 (worst) to 100, or [low, high] to train on the whole range.
        test_quality: quality that is evaluated, null for ``quality`` (the middle of a range, rounded down).
        cutblur: probability of CutBlur in training (:func:`densectx.tasks.restoring.cutblur`).
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    score = Score("psnr", "jpeg")
    on_colour = "luma"
    output = "restored"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        quality: int | Sequence[int] = 10,
        test_quality: int | None = None,
        cutblur: float = 0.0,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if info.channels not in (1, 3):
            raise ConfigError(f"jpeg_deblocking: source {source!r} has {info.channels} channels, JPEG has 1 or 3.")
        low, high = restoring.span("jpeg_deblocking: quality", quality, 1, 100)
        self.low, self.high = int(low), int(high)
        test = (self.low + self.high) // 2 if test_quality is None else test_quality
        self.test_quality = int(restoring.span("jpeg_deblocking: test_quality", test, 1, 100)[0])
        self.cutblur = restoring.chance("jpeg_deblocking: cutblur", cutblur)
        self.convention = (
            f"quality {self.test_quality}, 8-bit {restoring.colours(info.channels)}, whole image, per image, peak 255"
        )
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
        self.metrics = restoring.restored_metrics("jpeg")

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The image after compression; the image."""
        clean = batch["image"]
        compressed = []
        for image, gray, rng in zip(clean.cpu(), batch["gray"].tolist(), rngs, strict=True):
            quality = self.test_quality
            if self.training:
                draw = torch.randint(self.high - self.low + 1, (), generator=restoring.on_cpu(rng, "quality"))
                quality = self.low + int(draw.item())
            compressed.append(jpeg(image[:1] if gray else image, quality).expand_as(image))
        x = torch.stack(compressed).to(clean.device)
        if self.training:
            x = restoring.cutblur(x, clean, rngs, self.cutblur)
        return x, {"image": restoring.masked(clean, batch)}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The given picture; it is not compressed again."""
        return image

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """Of the answer and of the JPEG."""
        restoring.measure(self.metrics, quantize(prediction), x, target["image"])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """JPEG, answer, truth."""
        return restoring.pictures(x, prediction, target["image"])


def jpeg(image: Tensor, quality: int) -> Tensor:
    """What a JPEG file gives back: (1 | 3, H, W) sRGB 0..1 -> the same shape float32, on the CPU.

    Baseline JPEG of Pillow's library, 4:2:0 in colour, the standard's tables scaled by the quality.
    """
    pixels = (image.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    values = np.asarray(Image.open(file)).reshape(pixels.shape)
    return torch.from_numpy(values.transpose(2, 0, 1).copy()).float() / 255
