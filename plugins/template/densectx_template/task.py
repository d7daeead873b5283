"""A task: from the sample of a source to input, target, loss, metric and pictures."""

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
from densectx.tasks.base import Counting, Target, Task
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms


@final
class Degamma(Task, Counting):
    """Removes an unknown gamma: image ** g (B, C, H, W) -> image (B, C, H, W), sRGB 0..1.

    g is 2 ** u with u uniform in [-strength, strength], one draw an image. PSNR in dB, answer rounded to 8 bit, mean
    over images; ``input`` is that of the image as it was given.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a data source.
        weight: of its loss.
        strength: largest binary logarithm of the gamma.
        head: spec of the head.
        loss: spec of the loss, or a list of them.
    """

    score = Score("psnr", "input")
    output = "restored"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        strength: float = 1.0,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if strength <= 0:
            raise ConfigError(f"degamma: strength {strength} must be positive.")
        self.strength = strength
        channels = {"in_channels": info.channels, "out_channels": info.channels}
        self.head = HEADS.build(head, "head", features=features, scale=1, residual=True, **channels)
        self.criterion = Criterion(loss, form="numbers")
        self.metrics = ImageMetrics({"psnr": psnr}, "input")

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The image with another gamma; the image, NaN (unlabelled) where it was padded."""
        image = batch["image"]
        draws = torch.stack([torch.rand((), generator=rng, device=rng.device) for rng in rngs])
        gamma = 2 ** (self.strength * (2 * draws - 1)).view(-1, 1, 1, 1)
        valid = batch.get("valid")
        target = image if valid is None else image.where(valid[:, None], torch.nan)
        return image.clamp_min(1e-6) ** gamma, {"image": target}

    def inputs(self, image: Tensor, options: Mapping[str, float | Tensor | None]) -> Tensor:
        """The given image."""
        return image

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Of the restored image."""
        return self.criterion(output, target["image"])

    def weights(self, target: Target) -> dict[str, Tensor]:
        """Of what is known of the target."""
        return self.criterion.weights(target["image"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """The restored image, unclamped."""
        return output

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """PSNR of the answer and of the input; evaluation pads nothing."""
        self.metrics.update(quantize(prediction), x, target["image"])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Input, answer, truth."""
        return [as_rgb(picture)[0].nan_to_num().clamp(0, 1) for picture in (x, prediction, target["image"])]
