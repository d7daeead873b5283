"""What tasks that restore pictures have in common: padded pixels, CutBlur, measures, pictures."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from densectx.errors import ConfigError
from densectx.metrics import ImageMetrics, psnr
from densectx.metrics.ssim import ssim
from densectx.nn.colour import as_rgb
from densectx.rng import generator
from densectx.tasks.base import Counting, Target, Task
from densectx.types import Sample, SourceInfo, Terms

CUT_RATIO, CUT_SPREAD = 0.7, 0.01  # side of CutBlur's box / side of the image: mean and standard deviation


class Restoring(Task, Counting, ABC):
    """A task whose network gives the restored picture itself; ``prepare`` has the clean one as ``target["image"]``."""

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Of the restored picture."""
        return self.criterion(output, target["image"])

    def weights(self, target: Target) -> dict[str, Tensor]:
        """Of what is known of the target."""
        return self.criterion.weights(target["image"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """The restored picture, unclamped."""
        return output


def span(name: str, value: float | Sequence[float], low: float, high: float) -> tuple[float, float]:
    """An option that is a number or a range [low, high] of them, as a range.

    Raises:
        ConfigError: it is neither, or leaves the given bounds.
    """
    ends = [float(value)] if isinstance(value, int | float) else [float(one) for one in value]
    if len(ends) not in (1, 2) or not low <= ends[0] <= ends[-1] <= high:
        raise ConfigError(f"{name} {value!r} is not a number in {low:g}..{high:g} or a range [low, high] of them.")
    return ends[0], ends[-1]


def chance(name: str, value: float) -> float:
    """An option that is a probability.

    Raises:
        ConfigError: it is not in [0, 1].
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} {value!r} is not a probability in [0, 1].")
    return float(value)


def colours(channels: int) -> str:
    """What a convention calls images of so many channels."""
    return {1: "gray", 3: "RGB"}.get(channels, f"{channels} channels")


def masked(image: Tensor, batch: Sample, scale: int = 1) -> Tensor:
    """The truth with NaN where augmentation padded the image, so that losses pass over it.

    Args:
        image: (B, C, H * scale, W * scale), or cropped at the bottom and right.
        batch: with ``valid`` (B, H, W) bool, or without.
        scale: size of the truth / size of the batch's image.
    """
    valid = batch.get("valid")
    if valid is None:
        return image
    valid = valid.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    return image.where(valid[:, None, : image.shape[-2], : image.shape[-1]], torch.nan)


def paired_target(batch: Sample) -> Tensor:
    """The other picture of a pair, with the channels of ``image``: (B, C, H * scale, W * scale).

    Raises:
        ConfigError: it has another number of channels.
    """
    target, channels = batch["target"], batch["image"].shape[1]
    if target.shape[1] != channels:
        raise ConfigError(f"the target has {target.shape[1]} channels, the image {channels}; they must be the same.")
    return target


def check_pairs(task: str, source: str, info: SourceInfo, scale: int) -> None:
    """Refuse a source whose target is not a picture ``scale`` times as large as its image.

    Raises:
        ConfigError: no such target, or another ratio; both ratios are named.
    """
    if info.target != "image":
        raise ConfigError(
            f"{task}: source {source!r} has no second picture of each scene as its target"
            f" (its target is {info.target!r}); name a data set of pairs."
        )
    if info.scale != scale:
        raise ConfigError(
            f"{task}: the targets of source {source!r} are {info.scale} times as large as its images, the task"
            f" wants {scale} times; change the task's scale or the source's."
        )


def on_cpu(rng: torch.Generator, purpose: str) -> torch.Generator:
    """A generator for numbers that the CPU decides by: reading one from a device waits for all of its work.

    Args:
        rng: of a sample; itself if it is one of the CPU.
        purpose: another one gives other numbers.
    """
    return rng if rng.device.type == "cpu" else generator(rng.initial_seed(), purpose)


def cutblur(x: Tensor, truth: Tensor, rngs: Sequence[torch.Generator], probability: float) -> Tensor:
    """CutBlur: a random box of the truth pasted into the degraded image, or of the image into the truth.

    The network learns where not to change anything. Both cases are equally likely; the box has 0.7 of each side,
    with a standard deviation of 0.01, anywhere.

    Args:
        x: (B, C, H, W), degraded.
        truth: (B, C, H, W), not masked.
        rngs: one generator a sample; nothing is drawn if the probability is 0.
        probability: of being applied, to each image on its own.

    Returns:
        (B, C, H, W); ``x`` itself if the probability is 0.

    Source: Yoo, Ahn, Sohn, Rethinking Data Augmentation for Image Super-resolution, CVPR 2020, eq. 1 and appendix.
    """
    if not probability:
        return x
    height, width = x.shape[-2:]
    mixed = []
    for image, clean, own in zip(x, truth, rngs, strict=True):
        rng = on_cpu(own, "cutblur")
        apply, reverse, top, left = torch.rand(4, generator=rng).tolist()
        spread = torch.randn((), generator=rng).item()
        ratio = min(max(CUT_RATIO + CUT_SPREAD * spread, 0.0), 1.0)
        rows, columns = round(height * ratio), round(width * ratio)
        y, x0 = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        inside = torch.zeros(height, width, dtype=torch.bool, device=x.device)
        inside[y : y + rows, x0 : x0 + columns] = True
        mixed.append(torch.where(inside ^ (reverse < 0.5), clean, image) if apply < probability else image)
    return torch.stack(mixed)


def restored_metrics(baseline: str) -> ImageMetrics:
    """PSNR in dB and SSIM, means over images."""
    return ImageMetrics({"psnr": psnr, "ssim": ssim}, baseline)


def measure(metrics: Metric, prediction: Tensor, baseline: Tensor, truth: Tensor) -> None:
    """Count the images that have a truth, (B, C, H, W) three times; a sample without one is NaN."""
    known = ~truth.isnan().flatten(1).any(1)
    if known.any():
        metrics.update(prediction[known], baseline[known], truth[known])


def pictures(*images: Tensor) -> list[Tensor]:
    """(1, C, H, W) each -> [(3, H, W)] in [0, 1] by :func:`as_rgb`; what is not known is black."""
    return [as_rgb(image)[0].nan_to_num().clamp(0, 1) for image in images]
