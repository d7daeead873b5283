"""The 313 bins of chroma of Zhang, Isola and Efros (2016), "Colorful Image Colorization": encoding and decoding.

The bins are squares of 10 x 10 units of CIE Lab whose centres lie on multiples of 10. Which of them are used cannot be
derived from the gamut of sRGB by rounding (that gives 261); it is the authors' table, here as one range of b for each
a. Every colour of sRGB lies within 7.06 units of a centre, and 52 bins hold no colour of 8-bit sRGB.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

NEIGHBOURS = 5
"""Bins that a colour is spread over."""

SIGMA = 5.0
"""Of the Gaussian that spreads it, in units of Lab."""

_RANGES = {  # a: first and last b
    -90: (50, 90),
    -80: (20, 90),
    -70: (0, 90),
    -60: (-20, 90),
    -50: (-30, 100),
    -40: (-40, 100),
    -30: (-50, 100),
    -20: (-50, 100),
    -10: (-60, 100),
    0: (-70, 100),
    10: (-80, 90),
    20: (-80, 90),
    30: (-90, 90),
    40: (-100, 90),
    50: (-100, 80),
    60: (-110, 80),
    70: (-110, 80),
    80: (-110, 70),
    90: (-110, 70),
    100: (-90, 0),
}
BINS = sum((last - first) // 10 + 1 for first, last in _RANGES.values())
"""Their number, 313."""

_LIMIT, _CELL = 128, 4  # the candidate table covers [-128, 128]^2 in cells of this side
_CHUNK = 1 << 17  # colours that are looked up at a time: about 20 MB


@final
class AbBins(nn.Module):
    """Nearest bins, soft encoding and annealed mean. No parameters; its buffer is not part of a checkpoint.

    The nearest bins are exact and cheap: for each cell of 4 x 4 units a table holds every bin that can be among the
    five nearest of a colour in that cell, and only those are compared (at most 13 of 313). The table is no state:
    casts and averages of weights go over buffers, and would round its whole numbers and spoil its infinite ones.
    """

    centres: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", centres(), persistent=False)

    def nearest(self, ab: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """The nearest bins of each colour, near to far.

        Args:
            ab: (N, 2), units of Lab, finite; values beyond +-128, which no sRGB colour has, are clamped to that.
            count: 1 to 5.

        Returns:
            Indices (N, count) int64 and squared distances (N, count), of the type of ``ab``.
        """
        found = [self._nearest(part, count) for part in torch.split(ab.clamp(-_LIMIT, _LIMIT), _CHUNK)]
        return torch.cat([index for index, _ in found]), torch.cat([distance for _, distance in found])

    def encode(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """Soft encoding: the 5 nearest bins, weighted by a Gaussian of sigma 5 of the distance.

        Args:
            ab: (N, 2), units of Lab, finite.

        Returns:
            Indices (N, 5) int64, near to far, and weights (N, 5) that sum to 1.
        """
        index, distance = self.nearest(ab, NEIGHBOURS)
        return index, (-distance / (2 * SIGMA**2)).softmax(1)

    def decode(self, logits: Tensor, temperature: float) -> Tensor:
        """Annealed mean f_T, equation 5: the mean of the centres under softmax(logits / T).

        Args:
            logits: (B, 313, H, W).
            temperature: T > 0; 1 is the mean of the distribution, towards 0 its mode.

        Returns:
            (B, 2, H, W), units of Lab.
        """
        return torch.einsum("bqhw,qc->bchw", (logits / temperature).softmax(1), self.centres.to(logits.dtype))

    def _nearest(self, ab: Tensor, count: int) -> tuple[Tensor, Tensor]:
        side = 2 * _LIMIT // _CELL
        cell = ((ab + _LIMIT) / _CELL).long().clamp_(max=side - 1)
        row = cell[:, 0] * side + cell[:, 1]
        candidates, places = _tables(ab.device)
        a, b = (place.index_select(0, row).to(ab.dtype) for place in places)
        distance = (a - ab[:, :1]).square_().add_((b - ab[:, 1:]).square_())
        near, at = distance.min(1, keepdim=True) if count == 1 else distance.topk(count, 1, largest=False)
        return candidates[row].gather(1, at), near


def centres() -> Tensor:
    """The bins' centres (313, 2) float32, (a, b) in units of Lab, sorted by a, then b."""
    found = [(a, b) for a, (first, last) in _RANGES.items() for b in range(first, last + 1, 10)]
    return torch.tensor(found, dtype=torch.float32)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The candidates of each cell (cells, C) int64, and their a and b (2, cells, C) float32, on a device."""
    with torch.inference_mode(mode=False):  # made once, perhaps in a validation, and used in training too
        table = _candidates()
        far = torch.cat([centres(), torch.full((1, 2), torch.inf)])  # the bin that fills rows up is never near
        return table.to(device), far[table].movedim(2, 0).contiguous().to(device)


def _candidates() -> Tensor:
    """(cells, C) int64: the bins that can be among the 5 nearest of a colour in each cell, filled up with 313.

    A bin among the 5 nearest of a colour is no further from it than the fifth of the bins' greatest distances to the
    cell; so a bin whose least distance to the cell is greater cannot be one.
    """
    edges = torch.arange(-_LIMIT, _LIMIT + 1, _CELL, dtype=torch.float64)
    spans = torch.stack([torch.stack(pair) for pair in pairwise(edges)])  # (side, 2): a cell's low and high
    offset = centres().double().T[:, None, :, None] - spans[None, :, None, :]  # (2, side, bins, 2)
    inside = (offset[..., 0] > 0) & (offset[..., 1] < 0)
    least = offset.abs().amin(3).masked_fill(inside, 0.0).square()
    most = offset.abs().amax(3).square()
    near, far = ((d[0][:, None] + d[1][None]).flatten(0, 1) for d in (least, most))  # (side^2, bins)
    possible = near <= far.kthvalue(NEIGHBOURS, 1, keepdim=True).values + 1e-3  # room for rounding in float32
    width = int(possible.sum(1).max())
    order = possible.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return order.masked_fill(~possible.gather(1, order), BINS)
