"""Removal of additive Gaussian noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses import Criterion
from densectx.metrics import ImageMetrics, psnr, quantize
from densectx.nn.colour import as_rgb
from densectx.registry import HEADS
from densectx.tasks.base import Target, Task
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms


@final
class Denoising(Task):
    """Noisy image (B, C, H, W) -> clean image (B, C, H, W), sRGB 0..1, unclamped.

    Noise is N(0, (sigma / 255)^2), drawn on the device in float32, neither clipped nor rounded. With a range of
    sigmas the network is told the level of each image by a constant map, an extra input channel (FFDNet, Zhang et
    al. 2018); the trunk takes it where ``model.backbone.in_channels`` leaves room, the head always.
    PSNR as published: answer clamped and rounded to 8 bit, whole image, mean over images.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of the data source.
        weight: of its loss.
        sigma: noise level on the 0..255 scale, or [low, high] to train on the whole range.
        test_sigma: level that is evaluated, null for ``sigma`` (the middle of a range).
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    score = Score("psnr", "noisy")
    on_colour = "per_channel"
    output = "restored"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        sigma: float | Sequence[float] = 25.0,
        test_sigma: float | None = None,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        levels = [float(sigma)] if isinstance(sigma, int | float) else [float(s) for s in sigma]
        conditioned = len(levels) == 2
        channels = info.channels + conditioned
        super().__init__(source, weight, channels=channels, in_channels=in_channels, maps=int(conditioned))
        if len(levels) > 2 or not levels or not 0 <= levels[0] <= levels[-1]:
            raise ConfigError(f"denoising: sigma {sigma!r} is not a level >= 0 or a range [low, high] of them.")
        self.low, self.high, self.conditioned = levels[0], levels[-1], conditioned
        self.image_channels = info.channels
        self.test_sigma = sum(levels) / len(levels) if test_sigma is None else float(test_sigma)
        self.options = {"sigma": None} if self.conditioned else {}
        name = head if isinstance(head, str) else str(head.get("name"))
        if conditioned and in_channels != channels and "in_channels" not in HEADS.options(name):
            raise ConfigError(
                f"denoising: neither the trunk nor head {name!r} would see the noise level of a range of sigmas; set"
                f" model.backbone.in_channels to {channels}, or take head 'decoder'."
            )
        self.head = HEADS.build(
            head, "head", features=features, in_channels=channels, out_channels=info.channels, scale=1, residual=True
        )
        self.criterion = Criterion(loss)
        self.metrics = ImageMetrics({"psnr": psnr}, "noisy")

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """Image plus noise (and level map); the clean image."""
        clean = batch["image"]
        sigmas, noise = [], []
        for rng, image in zip(rngs, clean, strict=True):
            draw = torch.rand((), generator=rng, device=rng.device)
            level = (
                self.low + (self.high - self.low) * draw if self.training else torch.full_like(draw, self.test_sigma)
            )
            # one channel of noise for a gray image, so that the noisy image is gray too
            sigmas.append(level)
            noise.append(torch.randn(image.shape, generator=rng, device=rng.device))
        sigma = torch.stack(sigmas).view(-1, 1, 1, 1)
        stacked = torch.stack(noise)
        stacked = torch.where(batch["gray"].view(-1, 1, 1, 1), stacked[:, :1].expand_as(stacked), stacked)
        return self._with_map(clean + stacked * sigma / 255, sigma), {"image": clean}

    def inputs(self, image: Tensor, options: Mapping[str, float | None]) -> Tensor:
        """The given (noisy) image, with its level map if the network takes one.

        Raises:
            ConfigError: ``sigma`` is needed and not given.
        """
        if not self.conditioned:
            return image
        sigma = options.get("sigma")
        if sigma is None or not 0 <= sigma <= 255:
            raise ConfigError(
                f"denoising needs the noise level of the image: sigma is {sigma}, expected {self.low:g} to"
                f" {self.high:g} on the 0..255 scale (--set denoising.sigma=25, options={{'denoising.sigma': 25}})."
            )
        return self._with_map(image, torch.full((len(image), 1, 1, 1), float(sigma), device=image.device))

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Of the denoised image."""
        return self.criterion(output, target["image"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """The denoised image, unclamped."""
        return output

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """PSNR of the answer and of the noisy input (not clipped)."""
        # the noisy input is measured as it is: theory says 20 log10(255 / sigma)
        self.metrics.update(quantize(prediction), x[:, : self.image_channels], target["image"])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Noisy, denoised, clean."""
        pictures = (x[:, : self.image_channels], prediction, target["image"])
        return [as_rgb(picture)[0].clamp(0, 1) for picture in pictures]

    def _with_map(self, image: Tensor, sigma: Tensor) -> Tensor:
        if not self.conditioned:
            return image
        level = (sigma / 255).expand(-1, 1, *image.shape[-2:])
        return torch.cat([image, level.to(image.dtype)], 1)
