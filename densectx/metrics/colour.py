"""Metrics of colorization."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric

from densectx.nn.ab_bins import AbBins
from densectx.nn.ab_prior import AbPrior
from densectx.nn.colour import lab_to_rgb

THRESHOLDS = 150
"""Largest distance in ab that the area under the curve looks at."""

_MEASURES = ("ab_psnr", "psnr", "colourfulness", "colourfulness_absolute")
_ANSWERS = ("", "_gray", "_mean")


@final
class ColourMetrics(Metric):
    """What a colorization is worth, beside two trivial answers with the true lightness.

    Means over images of what is computed for each image, over its labelled pixels:

    - ``ab_psnr``: PSNR in dB over both channels of chroma, peak 255 (units of Lab);
    - ``psnr``: PSNR in dB of sRGB, float, peak 1;
    - ``colourfulness``, ``colourfulness_absolute``: see :func:`colourfulness`; ``colourfulness_truth`` and
      ``colourfulness_absolute_truth`` are those of the true image. Near to the truth is good, not high.

    Over all labelled pixels of all images (the images of Zhang et al. have one size, where it is the same):

    - ``auc``: of the cumulative histogram of the distance in ab, see :func:`auc_share`, in percent;
    - ``auc_rebalanced``: the same with every pixel weighted by the inverse of the prior of its true bin (equation 4 of
      Zhang et al. 2016 with lambda = 0). Depends on the prior: compare numbers of the same prior only.

    ``<name>_gray`` is the answer a = b = 0, ``<name>_mean`` the mean colour of the prior everywhere. Images without a
    labelled pixel do not count.

    Args:
        prior: how often each bin of chroma occurs.
    """

    total: Tensor
    truth: Tensor
    count: Tensor
    area: Tensor
    weight: Tensor
    full_state_update = False

    def __init__(self, prior: AbPrior) -> None:
        super().__init__()
        self.prior, self.bins = prior, AbBins()
        shapes = {"total": (3, 4), "truth": (2,), "count": (), "area": (3, 2), "weight": (2,)}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Count a batch.

        Args:
            prediction: (B, 3, H, W) CIE Lab.
            truth: (B, 3, H, W) CIE Lab, chroma NaN where unlabelled.

        Raises:
            DataError: the file of the prior cannot be read.
        """
        known = ~truth.isnan().any(1)
        counts = known.flatten(1).any(1)
        # in float64: in float32 the size of a batch shows in the last digits, and with it the number of ranks
        prediction, truth, known = prediction[counts].double(), truth[counts].double().nan_to_num(), known[counts]
        if len(truth) == 0:
            return
        rgb = lab_to_rgb(truth)
        ab = truth[:, 1:].movedim(1, -1)[known]
        weights = self.prior.weights(1.0).to(ab.device)[self.bins.nearest(ab)[0][:, 0]]
        mean = torch.tensor(self.prior.mean, dtype=truth.dtype, device=truth.device)
        for row, answer in enumerate((prediction, _flat(truth, torch.zeros_like(mean)), _flat(truth, mean))):
            colours = lab_to_rgb(answer)
            values = [
                _psnr(answer[:, 1:] - truth[:, 1:], known, 255.0),
                _psnr(colours - rgb, known, 1.0),
                colourfulness(colours, known),
                colourfulness(colours, known, absolute=True),
            ]
            self.total[row] += torch.stack([value.double().sum() for value in values])
            share = auc_share((answer[:, 1:].movedim(1, -1)[known] - ab).norm(dim=1)).double()
            self.area[row] += torch.stack([share.sum(), (share * weights).sum()])
        self.truth += torch.stack([colourfulness(rgb, known, absolute=way).double().sum() for way in (False, True)])
        self.count += len(truth)
        self.weight += torch.stack([weights.new_tensor(len(weights)), weights.sum()])

    def compute(self) -> dict[str, Tensor]:
        """{metric: scalar}; NaN without labelled pixels."""
        means, areas, truth = self.total / self.count, 100 * self.area / self.weight, self.truth / self.count
        found: dict[str, Tensor] = {}
        for row, answer in enumerate(_ANSWERS):
            found |= {f"{name}{answer}": value for name, value in zip(_MEASURES, means[row], strict=True)}
            found |= {f"auc{answer}": areas[row, 0], f"auc_rebalanced{answer}": areas[row, 1]}
        return found | {"colourfulness_truth": truth[0], "colourfulness_absolute_truth": truth[1]}


def auc_share(distance: Tensor) -> Tensor:
    """What a pixel at this distance adds to the area under the curve, as a share of all: any shape, units of Lab.

    The curve is the share of pixels at most t away, t = 0, 1, ..., 150; its area by the trapezoidal rule divided by
    150 is the mean of this over pixels: 1 at distance 0, (150.5 - ceil(d)) / 150 to 150, 0 beyond. Zhang et al. 2016
    give the thresholds, not the rule.
    """
    step = distance.ceil()
    share = (THRESHOLDS + 0.5 - step) / THRESHOLDS
    return torch.where(step == 0, 1.0, torch.where(step > THRESHOLDS, 0.0, share))


def colourfulness(rgb: Tensor, known: Tensor | None = None, *, absolute: bool = False) -> Tensor:
    """Colourfulness of each image (Hasler & Süsstrunk 2003, M^(3)): sigma + 0.3 mu of the opponent colours.

    On the 0..255 scale, not rounded; population statistics. The paper's opponent colours R - G and (R + G) / 2 - B
    have signs; the code of DDColor (Kang et al. 2023) takes their absolute values, which reads lower.

    Args:
        rgb: (B, 3, H, W) sRGB 0..1.
        known: (B, H, W) bool, the pixels that count; None for all.
        absolute: as DDColor.

    Returns:
        (B,); 0 for a gray image, NaN where no pixel counts.
    """
    r, g, b = (255 * rgb).unbind(1)
    opponents = torch.stack([r - g, (r + g) / 2 - b], 1)
    opponents = (opponents.abs() if absolute else opponents).flatten(2)
    weight = torch.ones_like(opponents[:, :1]) if known is None else known.flatten(1)[:, None].to(rgb.dtype)
    weight = weight / weight.sum(2, keepdim=True)
    mean = (weight * opponents).sum(2, keepdim=True)
    variance = (weight * (opponents - mean).square()).sum((1, 2))
    return variance.sqrt() + 0.3 * mean.square().sum((1, 2)).sqrt()


def _psnr(error: Tensor, known: Tensor, peak: float) -> Tensor:
    """As :func:`densectx.metrics.psnr`, over the known pixels."""
    squares = (error.square().mean(1) * known).flatten(1).sum(1) / known.flatten(1).sum(1)
    return -10 * (squares / peak**2).clamp_min(1e-10).log10()


def _flat(lab: Tensor, colour: Tensor) -> Tensor:
    """Its lightness with one colour (a, b) everywhere."""
    return torch.cat([lab[:, :1], colour.view(1, 2, 1, 1).expand_as(lab[:, 1:])], 1)
