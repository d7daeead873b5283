"""How far a network is from commuting with shifts of its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from densectx.errors import ConfigError


class ShiftError(NamedTuple):
    """Root mean square of f(shift x) - shift f(x), relative to that of shift f(x).

    Attributes:
        shift: of the input, in pixels.
        whole: over the whole output.
        interior: over the output further than margin and shift from the borders that the shift crosses; None where
            nothing is left of it.
    """

    shift: int
    whole: float
    interior: float | None


@torch.no_grad()
def equivariance(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    shifts: Sequence[int],
    margin: float,
    *,
    scale: Fraction | int = 1,
    dim: int = -1,
) -> list[ShiftError]:
    """Shift-equivariance error of a function of images, by circular shifts along one axis.

    A stride-1 stack of convolutions of field R has none on the interior for margin (R - 1) / 2, at every shift, and
    none at all with circular padding. A network of total stride S has none for multiples of S only. Borders along the
    other axis meet both sides of the difference alike, hence belong to the interior.

    Args:
        run: (B, C, H, W) -> (B, K, h, w), the network; without randomness.
        x: (B, C, H, W), what it is run on, once as it is and once for each shift.
        shifts: in pixels of x; positive ones to the right (downwards).
        margin: pixels of the output that each border may have an effect on; infinite where something is global, 0 for
            valid convolutions.
        scale: output pixels for each input pixel: 1/8 for a network of stride 8 whose output is not upsampled.
            The output is shifted by the nearest whole number of its pixels.
        dim: axis of the shift, -1 (along W) or -2 (along H).

    Raises:
        ConfigError: another axis, a negative margin, or a scale that is not positive.
    """
    if dim not in (-1, -2) or margin < 0 or scale <= 0:
        raise ConfigError(f"equivariance: dim {dim} must be -1 or -2, margin {margin} >= 0 and scale {scale} > 0.")
    answer = run(x)
    errors = []
    for shift in shifts:
        expected = answer.roll(round(shift * scale), dim)
        error = run(x.roll(shift, dim)) - expected
        cut, side = margin + ceil(abs(shift) * scale), answer.shape[dim]
        interior = None
        if 2 * cut < side:
            kept = side - 2 * ceil(cut)
            interior = _ratio(error.narrow(dim, ceil(cut), kept), expected.narrow(dim, ceil(cut), kept))
        errors.append(ShiftError(shift, _ratio(error, expected), interior))
    return errors


def _ratio(error: Tensor, reference: Tensor) -> float:
    """Root mean square of one over that of the other, in float64; 0 where both vanish."""
    above, below = (float(t.double().square().mean().sqrt()) for t in (error, reference))
    return above / below if below else (0.0 if not above else float("inf"))
