"""Single-image super-resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from densectx.errors import ConfigError, DataError
from densectx.losses import Criterion
from densectx.metrics import quantize
from densectx.nn.colour import grey, luma, luma_of_grey
from densectx.nn.resize import bicubic
from densectx.registry import HEADS
from densectx.tasks import restoring
from densectx.tasks.base import Options, Target
from densectx.types import Feature, Sample, Score, SourceInfo, Spec


@final
class SuperResolution(restoring.Restoring):
    """Small image (B, C, h, w) -> image ``scale`` times larger (B, C, h * scale, w * scale), sRGB 0..1, unclamped.

    The small image is MATLAB's antialiased bicubic reduction, rounded to 8 bit, or the source's ``image`` beside its
    large ``target``; the network corrects the bicubic enlargement.

    PSNR and SSIM as published: answer rounded to 8 bit, MATLAB's luma (not rounded; that of the colours where
    ``channels: 1`` reduced a colour file to gray; a gray file's values as they are), ``scale`` pixels cropped at each
    border, mean over images, peak 255.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of the data source.
        weight: of its loss.
        scale: 2, 3 or 4.
        upsampling: where the network works: ``post`` on the small image, enlarging last (Shi et al. 2016), or
            ``pre`` on the bicubic enlargement, which costs scale^2 times as much (Dong et al. 2014, Kim et al. 2016).
        degradation: ``bicubic`` reduces the source's images; ``paired`` takes its pairs as they are.
        cutblur: probability of CutBlur in training (:func:`densectx.tasks.restoring.cutblur`), with ``pre`` only.
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
        upsampling: Literal["post", "pre"] = "post",
        degradation: Literal["bicubic", "paired"] = "bicubic",
        cutblur: float = 0.0,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if info.channels not in (1, 3):
            raise ConfigError(
                f"super_resolution: source {source!r} has {info.channels} channels; luma is measured, of 1 or 3."
            )
        if scale not in (2, 3, 4):
            raise ConfigError(f"super_resolution: scale {scale} is not 2, 3 or 4.")
        if cutblur and upsampling == "post":
            raise ConfigError("super_resolution: cutblur needs an input of the answer's size; set upsampling: pre.")
        self.paired = degradation == "paired"
        if self.paired:
            restoring.check_pairs("super_resolution", source, info, scale)
            self.requires = ("image", "target")
        elif info.size is not None and min(info.size) < scale:
            raise ConfigError(f"super_resolution: images of {info.size} pixels cannot be reduced by {scale}.")
        self.scale, self.input_scale = scale, scale if upsampling == "pre" else 1
        self.unchanged = self.paired and upsampling == "post"
        self.cutblur = restoring.chance("super_resolution: cutblur", cutblur)
        self.convention = f"Y, crop {scale}, per image, peak 255"
        self.head = HEADS.build(
            head,
            "head",
            features=features,
            in_channels=info.channels,
            out_channels=info.channels,
            scale=scale // self.input_scale,
            residual=True,
        )
        self.criterion = Criterion(loss, form="numbers")
        self.metrics = restoring.restored_metrics("bicubic")

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The small image, or its enlargement; the large image.

        With ``bicubic`` the large image is the source's, cropped (bottom, right) to a multiple of the scale.

        Raises:
            DataError: an image is too small to be reduced, or the two of a pair do not have the ratio of the scale.
        """
        small, large = self._pair(batch)
        x = bicubic(small, up=self.input_scale)
        if self.training and self.cutblur:
            x = restoring.cutblur(x, large.where(large.isfinite(), x), rngs, self.cutblur)
        truth = restoring.masked(large, batch, self.scale if self.paired else 1)
        return x, {"image": truth, "gray": batch["gray"]}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The given (small) image, or its enlargement."""
        return bicubic(image, up=self.input_scale)

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """PSNR and SSIM on luma of the answer and of bicubic enlargement."""
        enlarged = self._enlarged(x)
        for row, gray in enumerate(target["gray"].tolist()):
            images = (y[row : row + 1] for y in (prediction, enlarged, target["image"]))
            # of a gray file, as predict writes it
            answer, baseline, truth = (grey(y) if gray else y for y in images)
            measured = (self._measured(y, gray) for y in (quantize(answer), quantize(baseline), truth))
            restoring.measure(self.metrics, *measured)

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Bicubic, answer, truth."""
        return restoring.pictures(self._enlarged(x), prediction, target["image"])

    def _pair(self, batch: Sample) -> tuple[Tensor, Tensor]:
        image, scale = batch["image"], self.scale
        height, width = image.shape[-2:]
        if self.paired:
            large = restoring.paired_target(batch)
            if large.shape[-2:] != (height * scale, width * scale):
                raise DataError(
                    f"super_resolution: a target of {tuple(large.shape[-2:])} pixels for an image of {(height, width)};"
                    f" expected {(height * scale, width * scale)}, {scale} times as large."
                )
            return image, large
        height, width = height - height % scale, width - width % scale
        if not height or not width:
            raise DataError(f"an image of {tuple(image.shape[-2:])} pixels cannot be reduced by {scale}.")
        image = image[..., :height, :width]
        return quantize(bicubic(image, down=scale)), image

    def _enlarged(self, x: Tensor) -> Tensor:
        return bicubic(x, up=self.scale // self.input_scale)

    def _measured(self, image: Tensor, gray: bool) -> Tensor:
        """The channel that the literature measures, borders cropped unless nothing would be left."""
        if gray:
            y = image
        elif image.shape[1] == 1:  # made of colours by the reader
            y = luma_of_grey(image)
        else:
            y = luma(image)
        s = self.scale
        return y[..., s:-s, s:-s] if min(y.shape[-2:]) > 2 * s else y
