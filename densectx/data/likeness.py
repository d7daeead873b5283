"""Pictures that are nearly the same: copies that were compressed again, reduced or brightened.

A picture has 256 bits: whether each cell of a 17 x 16 reduction is lighter than its left neighbour. The bound was
chosen on BSDS500, Set12 and CamVid, well below what the nearest two distinct photographs differ by; most copies that
were compressed, halved or darkened lie below it, a few above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from densectx.data.alignment import luma

NEAR: Final = 20
"""Bits that differ at most."""

_COLOUR: Final = 40.0 / 255  # that the cells of a coarse reduction may differ by
_FLAT: Final = 0.03  # standard deviation of the reduction below which its bits are those of noise
_BLOCK: Final = 1 << 22  # comparisons at a time


@final
class Print(NamedTuple):
    """What is kept of a picture: 256 bits as (4,) uint64, and a reduction to 4 x 4 cells of gray or colours."""

    bits: NDArray[np.uint64]
    cells: NDArray[np.float32]


def print_of(image: Tensor) -> Print | None:
    """Of a picture (C, H, W), 0..1; None where it is flat, so that there is nothing to tell it by."""
    small = F.interpolate(luma(image)[None, None], (16, 17), mode="area")[0, 0]
    if float(small.std()) < _FLAT:
        return None
    bits = np.packbits((small[:, 1:] > small[:, :-1]).numpy().ravel()).view(np.uint64)
    cells = F.interpolate(image[None], (4, 4), mode="area")[0]
    return Print(bits, cells.numpy().ravel().astype(np.float32))


def near(some: Sequence[Print], others: Sequence[Print]) -> Iterator[tuple[int, int]]:
    """Pairs (index in ``some``, index in ``others``) of pictures that are nearly the same."""
    if not some or not others:
        return
    table = np.stack([one.bits for one in others])
    step = max(1, _BLOCK // len(others))
    for start in range(0, len(some), step):
        bits = np.stack([one.bits for one in some[start : start + step]])
        distance = np.zeros((len(bits), len(table)), np.uint16)
        for word in range(bits.shape[1]):
            distance += np.bitwise_count(bits[:, word, None] ^ table[None, :, word])
        for row, column in zip(*(places.tolist() for places in np.nonzero(distance <= NEAR)), strict=True):
            one, other = some[start + row].cells, others[column].cells
            if one.shape == other.shape and float(np.abs(one - other).max()) <= _COLOUR:
                yield start + row, column
