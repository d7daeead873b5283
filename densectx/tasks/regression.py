"""Numbers for every pixel: depth, height, flow, a density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from densectx.errors import ConfigError, DataError
from densectx.losses import Criterion
from densectx.metrics.regression import RegressionMetrics
from densectx.nn.colour import as_rgb, lab_to_rgb
from densectx.registry import HEADS
from densectx.tasks.base import Counting, Options, Target, Task
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms


@final
class Range:
    """Numbers in [low, high] of some unit, and the network's own scale on which they are 0 to 1.

    ``linear``: u = (y - low) / (high - low). ``log``: u = log(y / low) / log(high / low), so that equal steps of u are
    equal ratios of y.

    Args:
        low: smallest answer, in the unit of the target.
        high: largest answer.
        transform: ``linear`` or ``log``.

    Raises:
        ConfigError: an empty range, or ``log`` with ``low`` not positive.
    """

    def __init__(self, low: float, high: float, transform: str = "linear") -> None:
        if transform not in ("linear", "log"):
            raise ConfigError(f"transform: expected linear or log, got {transform!r}.")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"low {low} and high {high}: expected finite numbers, low below high.")
        if transform == "log" and low <= 0:
            raise ConfigError(f"low {low}: with transform log it must be positive, the nearest value to be expected.")
        self.low, self.high, self.transform = float(low), float(high), transform

    def to_unit(self, value: Tensor) -> Tensor:
        """From numbers to u, any shape; NaN stays. Numbers outside the range are outside 0..1.

        Raises:
            DataError: a number that has no logarithm.
        """
        if self.transform == "linear":
            return (value - self.low) / (self.high - self.low)
        if (value <= 0).any():
            raise DataError(
                f"a target of {value[value <= 0].max().item():g} has no logarithm; unknown values must be NaN, or set"
                " transform to linear."
            )
        return (value / self.low).log() / math.log(self.high / self.low)

    def to_value(self, unit: Tensor) -> Tensor:
        """From u to numbers, any shape, clamped to [low, high]."""
        unit = unit.clamp(0, 1)
        if self.transform == "linear":
            return self.low + (self.high - self.low) * unit
        return self.low * (unit * math.log(self.high / self.low)).exp()


@final
class Regression(Task, Counting):
    """Numbers in the target's unit: image (B, C, H, W) -> (B, outputs, H * scale, W * scale), in [low, high].

    The network answers on a scale of about 0..1 (:class:`Range`), which is what losses see. A target is the value of a
    field at a pixel: where augmentation resizes a picture its numbers stay as they are, which is right for metres and
    wrong for what is measured in pixels (disparity, flow); train those without ``augment.scale``. Components of vectors
    would be wrong in a mirrored picture: where there are more outputs than one, training refuses to mirror or turn
    pictures, and so does ``predict --tta``, unless ``turns`` says that they have no direction.

    ``rmse`` is pooled over all known pixels, and printed beside that of the best constant, see
    :class:`densectx.metrics.regression.RegressionMetrics`. ``predict`` writes float32 TIFF files.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model; its ``scale`` is the answer's.
        source: key of a data source whose ``target`` is a map, NaN where unknown.
        weight: of its loss.
        low: smallest answer, in the target's unit; answers are clamped, targets are not.
        high: largest answer.
        transform: ``linear``, or ``log`` where ratios matter more than differences (depth).
        outputs: channels of the target.
        turns: whether the numbers stay as they are where the picture is mirrored or turned; null for one output only.
        head: spec of the head.
        loss: spec of the loss, or a list of them; of the numbers on the scale 0..1.
    """

    requires = ("image", "target")
    score = Score("rmse", "constant", higher_is_better=False)
    output = "values"
    unchanged = True

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        low: float = 0.0,
        high: float = 1.0,
        transform: Literal["linear", "log"] = "linear",
        outputs: int = 1,
        turns: bool | None = None,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] = "l1",
    ) -> None:
        super().__init__(source, weight, channels=info.channels, in_channels=in_channels)
        if info.target != "map":
            raise ConfigError(f"regression: source {source!r} has no map of numbers as its target; name one that has.")
        if outputs < 1:
            raise ConfigError(f"regression: outputs {outputs} must be positive, the channels of the target.")
        self.range, self.outputs, self.scale = Range(low, high, transform), outputs, info.scale
        self.turns = outputs == 1 if turns is None else turns  # several may be components of a vector
        self.head = HEADS.build(
            head, "head", features=features, in_channels=info.channels, out_channels=outputs, scale=info.scale
        )
        self.criterion = Criterion(loss, form="numbers")
        self.metrics = RegressionMetrics(outputs)

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """The image itself; the target as it is, and on the network's scale.

        Raises:
            DataError: the target has other channels, or a number that has no logarithm.
        """
        target = batch["target"]
        if target.shape[1] != self.outputs:
            raise DataError(
                f"regression: the target of source {self.source!r} has {target.shape[1]} channels, outputs is"
                f" {self.outputs}; set outputs to {target.shape[1]}."
            )
        return batch["image"], {"value": target, "unit": self.range.to_unit(target)}

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The image itself."""
        return image

    def loss(self, output: Tensor, target: Target) -> Terms:
        """On the network's scale."""
        return self.criterion(output, target["unit"])

    def weights(self, target: Target) -> dict[str, Tensor]:
        """Of what is known of the target."""
        return self.criterion.weights(target["unit"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """Numbers in the unit of the target, in [low, high]."""
        return self.range.to_value(output)

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """Errors of the known values."""
        self.metrics.update(prediction, target["value"])

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Image, then answer and truth of every channel, see :func:`side_by_side`."""
        return [as_rgb(x)[0], *side_by_side(prediction[0], target["value"][0], self.range)]


def side_by_side(answer: Tensor, truth: Tensor, limits: Range) -> list[Tensor]:
    """Answer and truth as colours of one scale, the range of the truth: (K, H, W) twice -> K pairs of (3, H, W).

    Args:
        answer: numbers.
        truth: numbers, NaN (drawn black) where unknown.
        limits: the scale where nothing is known.
    """
    pictures = []
    for one, other in zip(answer, truth, strict=True):
        known = other[~other.isnan()]
        seen = known if known.numel() else other.new_tensor([limits.low, limits.high])
        low, high = seen.aminmax()
        pictures += [false_colour((channel - low) / (high - low).clamp_min(1e-12)) for channel in (one, other)]
    return pictures


def false_colour(value: Tensor) -> Tensor:
    """(H, W) in 0..1 -> (3, H, W) sRGB 0..1, dark violet over teal to light yellow; NaN is black, others are clamped.

    Equal steps are equal steps of lightness: in CIE Lab L* goes evenly from 18 to 92 and the hue from 310 to 100
    degrees, with the chroma as high as keeps every colour inside sRGB.
    """
    v = value.float().nan_to_num().clamp(0, 1)
    hue, chroma = torch.deg2rad(310 - 210 * v), 35 * (1 - v).square() + 30 * v * (1 - v) + 50 * v.square()
    rgb = lab_to_rgb(torch.stack([18 + 74 * v, chroma * hue.cos(), chroma * hue.sin()])[None])[0]
    return torch.where(value.isnan(), 0.0, rgb)
