"""Whether two pictures of a scene, or a picture and its mask, lie on each other.

The bounds below were chosen on photographs of BSDS500 paired with copies of themselves (noise, JPEG, reduced and
enlarged, darkened; whole and as crops), so that no true pair is said to be shifted; some shifts, of one pixel under
blur above all, get no answer.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

_SIDE: Final = 256  # pixels of the middle that are compared
_LEAST: Final = 48  # pixels of a side from which on there is enough to compare
_ROOM: Final = 64  # the same for the borders of masks
_CUT: Final = 0.125  # standard deviation of the low pass, cycles a pixel: noise and JPEG live above
_SHARE, _PEAK = 0.2, 8.0  # of the height of a perfect peak, and standard deviations, from which on a peak is one
_SMOOTH, _GAIN = 5, 0.8  # pixels of a mean; what is left of 1 - correlation where a shift is one
_ALIKE: Final = 0.6  # correlation of thumbnails below which two pictures are of different scenes
_TURNED: Final = 0.9  # correlation from which on a turned or mirrored thumbnail is the picture
_THUMB, _CELL = 32, 8  # cells of a side at most, pixels of a cell at least: noise has to average out
_FLAT: Final = 0.02  # standard deviation of a thumbnail below which there is nothing to see
REACH: Final = 12
"""Shifts of a mask that are looked for, in pixels to each side."""

_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601


@final
class Pair(NamedTuple):
    """How the second picture lies on the first.

    Attributes:
        shift: (down, right) in pixels of the first, None where it cannot be told.
        other: what else is wrong: ``"scene"``, ``"turned"``, or nothing.
    """

    shift: tuple[int, int] | None
    other: str = ""


def compare(image: Tensor, target: Tensor) -> Pair:
    """Where a target lies on its image.

    Args:
        image: (C, H, W), 0..1.
        target: (C', H * s, W * s), 0..1, s a whole number.
    """
    one = luma(image)
    other = F.interpolate(luma(target)[None, None], one.shape, mode="area")[0, 0]
    cells = max(4, min(_THUMB, min(one.shape) // _CELL))
    small = [F.interpolate(x[None, None], (cells, cells), mode="area")[0, 0] for x in (one, other)]
    if min(float(x.std()) for x in small) < _FLAT:
        return Pair(None)
    alike = abs(_correlation(*small))
    if alike < _ALIKE:
        turns = [torch.rot90(small[1], k) for k in range(4)]
        best = max(abs(_correlation(small[0], t)) for turn in turns for t in (turn, turn.flip(1)))
        return Pair(None, "turned" if best >= _TURNED else "scene")
    return Pair(_shift(one, other))


def _shift(one: Tensor, other: Tensor) -> tuple[int, int] | None:
    """By phase correlation of the middles (Kuglin & Hines 1975), low-passed; None where there is no clear peak."""
    a, b = (_middle(x) for x in (one, other))
    height, width = a.shape
    if min(height, width) < _LEAST:
        return None
    window = torch.hann_window(height, periodic=False)[:, None] * torch.hann_window(width, periodic=False)
    cross = torch.fft.rfft2((a - a.mean()) * window).conj() * torch.fft.rfft2((b - b.mean()) * window)
    squares = torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()
    response = torch.fft.irfft2(cross / cross.abs().clamp_min(1e-9) * (-squares / (2 * _CUT**2)).exp(), a.shape)
    perfect = (a.numel() * 4 * math.pi * _CUT**2) ** 0.5  # a Gaussian's height over its deviation in so many pixels
    if not response.max() >= max(_PEAK, _SHARE * perfect) * response.std():
        return None
    down, right = divmod(int(response.argmax()), width)
    down, right = down - height * (down > height // 2), right - width * (right > width // 2)
    return (down, right) if _fits(a, b, down, right) else (0, 0)


def _fits(a: Tensor, b: Tensor, down: int, right: int) -> bool:
    """Whether two pictures, smoothed, are clearly more alike where one is moved; blur makes near shifts alike."""
    a, b = (F.avg_pool2d(x[None], _SMOOTH, 1)[0] for x in (a, b))
    height, width = a.shape
    if abs(down) >= height // 2 or abs(right) >= width // 2:
        return False
    rows, columns = slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right))
    moved = b[max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)]
    still = _correlation(a[rows, columns], b[rows, columns])
    return 1 - _correlation(a[rows, columns], moved) <= _GAIN * (1 - still)


def edge_correlation(image: Tensor, mask: Tensor) -> Tensor:
    """How well a mask's borders lie on a picture's edges for each shift: (2 REACH + 1, 2 REACH + 1) float32.

    Entry (REACH + i, REACH + j) is the correlation of the picture's gradient with the borders moved down by i and right
    by j; zeros where one of them has none. Of one picture it says little, the mean of several has a sharp peak.

    Args:
        image: (C, H, W), 0..1.
        mask: (H, W) class ids.
    """
    one, ids = _middle(luma(image)), _middle(mask)
    if min(one.shape) < _ROOM:
        return torch.zeros(2 * REACH + 1, 2 * REACH + 1)
    slope = torch.zeros_like(one)
    slope[1:-1] += (one[2:] - one[:-2]).square()
    slope[:, 1:-1] += (one[:, 2:] - one[:, :-2]).square()
    slope = slope.sqrt()
    slope = slope.clamp_max(float(slope.flatten()[:: max(1, slope.numel() // 4096)].quantile(0.95)))
    border = torch.zeros_like(one)
    border[1:-1] += (ids[2:] != ids[:-2]).float()
    border[:, 1:-1] += (ids[:, 2:] != ids[:, :-2]).float()
    border = border.clamp_max(1)
    slope, border = slope - slope.mean(), border - border.mean()
    norm = float((slope.square().sum() * border.square().sum()).sqrt())
    if norm == 0:
        return torch.zeros(2 * REACH + 1, 2 * REACH + 1)
    found: Tensor = torch.fft.irfft2(torch.fft.rfft2(border).conj() * torch.fft.rfft2(slope), one.shape)
    found = found.roll((REACH, REACH), (0, 1))
    return found[: 2 * REACH + 1, : 2 * REACH + 1] / norm


def luma(image: Tensor) -> Tensor:
    """(C, H, W) -> (H, W): of three channels BT.601, else their mean."""
    if len(image) == len(_LUMA):
        return (image * torch.tensor(_LUMA)[:, None, None]).sum(0)
    return image.mean(0)


def _middle(x: Tensor) -> Tensor:
    height, width = x.shape
    top, left = max(0, (height - _SIDE) // 2), max(0, (width - _SIDE) // 2)
    return x[top : top + _SIDE, left : left + _SIDE]


def _correlation(one: Tensor, other: Tensor) -> float:
    a, b = one - one.mean(), other - other.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp_min(1e-12))
