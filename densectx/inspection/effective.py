"""The effective receptive field (Luo et al. 2016): how much each input really weighs for an output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import curve_fit
from torch import Tensor, nn

from densectx.nn.modes import evaluating

SHARE = 1 - 0.9545
"""Of the largest value: what lies above it counts as effective, the two deviations of Luo et al."""


class EffectiveField(NamedTuple):
    """What one output weighs its inputs with.

    Attributes:
        map: (H, W) mean magnitude of the gradient over inputs, channels and signs, its largest value 1.
        area: pixels above 4.55 % of the largest value.
        side: square root of it.
        sigma: (vertical, horizontal) deviation in pixels of the Gaussian that fits the profile along each axis
            best; NaN where none fits.
        position: (row, column) of the output.
    """

    map: NDArray[np.float64]
    area: int
    side: float
    sigma: tuple[float, float]
    position: tuple[int, int]


def effective_field(
    module: nn.Module,
    shape: tuple[int, int, int, int],
    samples: int = 8,
    seed: int = 0,
    run: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> EffectiveField:
    """Mean gradient magnitude of the middle output with respect to random inputs, in evaluation mode.

    Luo, Li, Urtasun and Zemel, "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks"
    (2016), section 3: the gradient of the central output is averaged over random inputs; for one of several
    channels, the channels are added with random signs.

    Args:
        module: any network with real weights; its gradients and mode are left as they are.
        shape: (B, C, H, W) of an input; B inputs go through at once.
        samples: how many inputs, each uniform in 0..1.
        seed: of inputs and signs.
        run: ``run(module, x)`` gives the (B, K, h, w) output; ``module(x)`` if left out.
    """
    first = next(module.parameters(), None)
    device, dtype = (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(shape[2:], dtype=torch.float64)
    with evaluating(module):
        for _ in range(math.ceil(samples / shape[0])):
            x = torch.rand(shape, generator=generator, dtype=dtype).to(device).requires_grad_()
            with torch.enable_grad():
                output = module(x) if run is None else run(module, x)
            row, column = (side // 2 for side in output.shape[-2:])
            signs = torch.randint(2, output.shape[:2], generator=generator).to(device, output.dtype) * 2 - 1
            (gradient,) = torch.autograd.grad((output[..., row, column] * signs).sum(), x)
            total += gradient.double().abs().sum((0, 1)).cpu()
    values = total.numpy()
    values = values / values.max() if values.max() > 0 else values
    area = int((values > SHARE).sum())
    sigma = (_deviation(values.mean(1)), _deviation(values.mean(0)))
    return EffectiveField(values, area, math.sqrt(area), sigma, (row, column))


def _deviation(profile: NDArray[np.float64]) -> float:
    """Of the Gaussian that fits a profile best in the least squares."""
    place = np.arange(len(profile))
    weight = profile.sum()
    if weight <= 0 or len(profile) < 4:
        return math.nan
    centre = float((profile * place).sum() / weight)
    spread = math.sqrt(float((profile * (place - centre) ** 2).sum() / weight))

    def gaussian(at: NDArray[np.float64], height: float, middle: float, sigma: float) -> NDArray[np.float64]:
        return np.asarray(height * np.exp(-((at - middle) ** 2) / (2 * sigma**2)))

    try:
        (_, _, sigma), _ = curve_fit(gaussian, place, profile, (profile.max(), centre, max(spread, 0.5)), maxfev=2000)
    except RuntimeError:  # no fit is found
        return math.nan
    return abs(float(sigma))
