"""Which input positions each output position of an operation along one axis sees. Arrays (output size, taps)."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np

from densectx.inspection.spans import ABSENT, PADDING, Bools, Ints

Filter: TypeAlias = Literal["nearest", "nearest-exact", "linear", "cubic"]
_EPSILON = 1e-9  # a weight that close to zero is zero: sizes and scales are rational


def sliding(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Ints:
    """Of a convolution or pool; what lies beyond the input is ``PADDING``."""
    taps = np.arange(out)[:, None] * stride - padding + np.arange(kernel) * dilation
    return np.where((taps < 0) | (taps >= size), PADDING, taps)


def transposed(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Ints:
    """Of a transposed convolution; a tap that falls between two inputs is ``ABSENT``."""
    taps = np.arange(out)[:, None] + padding - np.arange(kernel) * dilation
    index = taps // stride
    index = np.where((index < 0) | (index >= size), PADDING, index)
    return np.where(taps % stride != 0, ABSENT, index)


def adaptive(size: int, out: int) -> Ints:
    """Of an adaptive pool: from floor(p size / out) up to ceil((p + 1) size / out)."""
    first = np.arange(out) * size // out
    last = -(-(np.arange(out) + 1) * size // out)
    taps = first[:, None] + np.arange(int((last - first).max()))
    return np.where(taps < last[:, None], taps, ABSENT)


def resampled(
    size: int, out: int, kind: Filter, *, scale: float | None, align_corners: bool, antialias: bool
) -> tuple[Ints, Bools]:
    """Of ``torch.nn.functional.interpolate``.

    Args:
        size: of the input.
        out: of the output.
        kind: nearest, linear or cubic.
        scale: output / input as it was given, None where a size was.
        align_corners: first and last positions fall on each other.
        antialias: the filter is stretched where the output is smaller.

    Returns:
        Taps whose weight is not zero, and positions whose filter reaches over a border.
    """
    ratio = 1 / scale if scale else size / out
    position = np.arange(out)
    if kind in ("nearest", "nearest-exact"):
        centre = position * ratio if kind == "nearest" else (position + 0.5) * ratio
        index = np.floor(centre + _EPSILON).astype(np.int64)
        return np.minimum(index, size - 1)[:, None], index > size - 1
    if align_corners:
        ratio = (size - 1) / (out - 1) if out > 1 else 0.0
        centre = position * ratio
    else:
        centre = (position + 0.5) * ratio - 0.5
    stretch = max(ratio, 1.0) if antialias else 1.0
    support = (1 if kind == "linear" else 2) * stretch
    reach = math.ceil(support) + 1
    taps = np.floor(centre + _EPSILON).astype(np.int64)[:, None] + np.arange(-reach, reach + 1)
    distance = np.abs(taps - centre[:, None]) / stretch
    end = 1 if kind == "linear" else 2
    seen = distance < end - _EPSILON
    if kind == "cubic":  # the kernel has a zero at distance 1
        seen &= np.abs(distance - 1) > _EPSILON
    beyond = (taps < 0) | (taps > size - 1)
    dirty = (seen & beyond).any(1)
    if antialias:  # weights beyond the border are left out
        return np.where(seen, np.where(beyond, PADDING, taps), ABSENT), dirty
    return np.where(seen, np.clip(taps, 0, size - 1), ABSENT), dirty
