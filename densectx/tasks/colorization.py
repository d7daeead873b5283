"""Colorization: chroma from lightness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.losses import Criterion
from densectx.losses.chroma import ChromaCrossEntropy
from densectx.metrics.colour import ColourMetrics
from densectx.nn.ab_prior import AbPrior
from densectx.nn.colour import as_rgb, lab_to_rgb, rgb_to_lab
from densectx.registry import HEADS
from densectx.tasks.base import Counting, Options, ReadingFiles, Target, Task
from densectx.tasks.chroma import Bins, Chroma, Numbers
from densectx.types import Feature, Sample, Score, SourceInfo, Spec, Terms


@final
class Colorization(Task, Counting, ReadingFiles):
    """Lightness (B, 1, H, W) of an image -> colour image (B, 3, H, W), sRGB 0..1.

    The network sees L / 100 of CIE Lab only; the answer keeps the input's L. What it learns:

    - ``target: regression``: (a, b) / 110. The best answer to a colour that lightness does not tell is the mean of all
      that it may be, which is pale.
    - ``target: bins``: a distribution over the 313 bins of chroma of Zhang et al. 2016, see
      :class:`densectx.tasks.chroma.Bins`, trained with :class:`densectx.losses.chroma.ChromaCrossEntropy`, rare colours
      weighted up. Its annealed mean is more vivid, and further from the truth in PSNR.

    Gray files and padded pixels are unlabelled. Metrics: :class:`densectx.metrics.colour.ColourMetrics`; ``gray`` is
    the answer a = b = 0.

    Args:
        features: given by the model.
        in_channels: given by the model.
        info: given by the model.
        source: key of a data source with colour images.
        weight: of its loss.
        head: spec of the head.
        loss: spec of the loss of a regression, or a list of them; null for l1. ``bins`` has a loss of its own.
        target: see above.
        rebalance: with bins, in [0, 1): 0 weighs all colours the same; null for the paper's 0.5 (lambda 0.5).
        temperature: with bins, of the annealed mean, in (0, 1]; null for the paper's 0.38.
        stride: with bins, side in pixels of the cells that have a distribution; null for the paper's 4.
        width: with bins, channels that the head gives; null for 64.
        prior: JSON file of how often each bin occurs, as ``benchmarks/ab_prior.py`` writes it; null for that of
            BSDS500, which densectx ships. Read as training or evaluation starts, not to ``predict``.
    """

    score = Score("ab_psnr", "gray")
    output = "image"
    convention = "Lab ab channels, per image, peak 255"

    def __init__(
        self,
        features: Sequence[Feature],
        in_channels: int,
        info: SourceInfo,
        source: str,
        weight: float = 1.0,
        head: Spec = "decoder",
        loss: Spec | Sequence[Spec] | None = None,
        target: Literal["regression", "bins"] = "regression",
        rebalance: float | None = None,
        temperature: float | None = None,
        stride: int | None = None,
        width: int | None = None,
        prior: str | None = None,
    ) -> None:
        super().__init__(source, weight, channels=1, in_channels=in_channels)
        if info.channels != 3:
            raise ConfigError(f"colorization: source {source!r} has {info.channels} channels, colour images have 3.")
        shape = {"stride": stride, "width": width, "temperature": temperature}
        given = {name: value for name, value in shape.items() if value is not None}
        known = AbPrior(prior)
        self.chroma: Chroma
        if target == "bins":
            if loss is not None:
                raise ConfigError("colorization: target bins has its own loss; leave loss out, or take regression.")
            self.chroma = Bins(**given)  # type: ignore[arg-type]  # numbers of the right kind by name
            self.period = self.chroma.stride  # cells begin at the upper left pixel
            # it is what a criterion is, with another target than the losses of a config can take
            self.criterion = ChromaCrossEntropy(known, 0.5 if rebalance is None else rebalance)  # type: ignore[assignment]
        else:
            unused = [*given, *(["rebalance"] if rebalance is not None else [])]
            if unused:
                raise ConfigError(f"colorization: {', '.join(unused)} is for target bins; this is a regression.")
            self.chroma = Numbers()
            self.criterion = Criterion("l1" if loss is None else loss, form="numbers")
        self.head = HEADS.build(head, "head", features=features, in_channels=1, out_channels=self.chroma.channels)
        self.metrics = ColourMetrics(known)
        self._prior = known

    def read_files(self) -> None:
        """The prior, whose numbers are then at hand: a regression would miss it at its first validation only."""
        _ = self._prior.counts

    def prepare(self, batch: Sample, rngs: Sequence[torch.Generator]) -> tuple[Tensor, Target]:
        """L / 100; (a, b), NaN in gray files (there is no colour to learn) and where ``valid`` is false."""
        lab = rgb_to_lab(batch["image"])
        known = ~batch["gray"].view(-1, 1, 1, 1)
        if "valid" in batch:
            known = known & batch["valid"][:, None]
        target = {"ab": torch.where(known, lab[:, 1:], torch.nan)}
        if "surround" in batch:
            target["surround"] = batch["surround"]
        return lab[:, :1] / 100, target

    def inputs(self, image: Tensor, options: Options) -> Tensor:
        """The lightness of the given image; its colours are not looked at."""
        return rgb_to_lab(as_rgb(image))[:, :1] / 100

    def loss(self, output: Tensor, target: Target) -> Terms:
        """Of (a, b) / 110, or of the bins of cells, which begin at the first pixel that is no surroundings."""
        ab, border = target["ab"], int(target["surround"][0]) if "surround" in target else 0
        rows, columns = (slice(border, size - border) for size in ab.shape[-2:])
        return self.criterion(*self.chroma.compared(output[..., rows, columns], ab[..., rows, columns]))

    def weights(self, target: Target) -> dict[str, Tensor]:
        """Of what is known of the target."""
        return self.criterion.weights(target["ab"])

    def postprocess(self, output: Tensor, x: Tensor) -> Tensor:
        """L of the input with the answered chroma, as sRGB."""
        return lab_to_rgb(torch.cat([x * 100, self.chroma.ab(output)], 1))

    def update(self, prediction: Tensor, x: Tensor, target: Target) -> None:
        """What was shown, in Lab again, so that clipping to the gamut counts."""
        self.metrics.update(rgb_to_lab(prediction), torch.cat([x * 100, target["ab"]], 1))

    def draw(self, prediction: Tensor, x: Tensor, target: Target) -> list[Tensor]:
        """Lightness, answer, truth (unlabelled gray)."""
        lightness, ab = x * 100, target["ab"].nan_to_num()
        flat, truth = (torch.cat([lightness, chroma], 1) for chroma in (torch.zeros_like(ab), ab))
        return [lab_to_rgb(flat)[0], prediction[0], lab_to_rgb(truth)[0]]
