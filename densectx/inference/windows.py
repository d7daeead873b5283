"""Where a picture is cut: windows that the model sees, and the parts of them that count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Final, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from densectx.errors import ConfigError

OVERLAP: Final = 0.25
"""Share of a blended window that its neighbour sees too."""


class Line(NamedTuple):
    """A window along one axis, in pixels of the picture: what is seen, and what is kept of it."""

    seen: slice
    kept: slice


class Window(NamedTuple):
    """A window of a picture."""

    rows: Line
    columns: Line


@final
@dataclass(frozen=True)
class Halo:
    """Pixels that an answer depends on around its own place, see :attr:`densectx.inference.tiling.Tiling.halo`.

    Attributes:
        top: above.
        bottom: below.
        left: to the left.
        right: to the right.
    """

    top: int
    bottom: int
    left: int
    right: int


def exact_lines(size: int, core: int, before: int, after: int, step: int) -> list[Line]:
    """Windows whose kept parts are those of the whole picture.

    Kept parts are ``core`` long and follow one another; windows reach ``before`` and ``after`` further, start at
    multiples of ``step`` and end early only where the picture does.

    Args:
        size: of the picture.
        core: a multiple of the step.
        before: halo in front.
        after: halo behind.
        step: windows start at its multiples, see :attr:`densectx.inference.tiling.Tiling.step`.

    Raises:
        ConfigError: as :func:`check_core`.
    """
    check_core(core, step)
    lines = []
    for first in range(0, size, core):
        last = min(first + core, size)
        start = max(first - before, 0) // step * step
        lines.append(Line(slice(start, min(last + after, size)), slice(first, last)))
    return lines


def check_core(core: int, step: int) -> None:
    """Refuse kept parts that :func:`exact_lines` cannot make.

    Raises:
        ConfigError: a core that is no multiple of the step.
    """
    if core < step or core % step:
        raise ConfigError(
            f"a tile of {core} pixels: this model's tiles start at multiples of {step}; take one of them."
        )


def overlapping_lines(size: int, side: int, overlap: int, step: int) -> list[Line]:
    """Windows of one size that overlap; everything seen is kept, with the weights of :func:`weights`.

    Args:
        size: of the picture.
        side: of the windows, a multiple of the step.
        overlap: least pixels that neighbours share, at least 1 and below ``side``.
        step: windows start at its multiples.

    Raises:
        ConfigError: as :func:`check_side`.
    """
    check_side(side, overlap, step)
    apart = (side - overlap) // step * step
    count = 1 if size <= side else 1 + -(-(size - side) // apart)
    return [Line(*(slice(first * apart, min(first * apart + side, size)),) * 2) for first in range(count)]


def check_side(side: int, overlap: int, step: int) -> None:
    """Refuse windows that :func:`overlapping_lines` cannot make.

    Raises:
        ConfigError: a side that is no multiple of the step, or too small for its overlap, or for having one.
    """
    if side % step or side - overlap < step or overlap < 1:
        raise ConfigError(
            f"windows of {side} pixels with {overlap} shared: this model's windows start at multiples of {step}; take"
            f" one of them, at least {least_side(step)}."
        )


def least_side(step: int) -> int:
    """The smallest window of which neighbours share a pixel, :data:`OVERLAP` of it, and that goes on by a step."""
    return max(2, ceil(1 / OVERLAP / step)) * step


def weights(lines: list[Line]) -> list[NDArray[np.float64]]:
    """Weights of the pixels of overlapping windows along one axis: falling linearly, their sum is 1 everywhere."""
    total = np.zeros(lines[-1].kept.stop)
    tents = []
    for number, line in enumerate(lines):
        length = line.kept.stop - line.kept.start
        tent = np.ones(length)
        for other, reversed_ in ((number - 1, False), (number + 1, True)):
            if 0 <= other < len(lines):
                shared = min(line.kept.stop, lines[other].kept.stop) - max(line.kept.start, lines[other].kept.start)
                ramp = (np.arange(length)[:: -1 if reversed_ else 1] + 0.5) / max(shared, 1)
                tent = np.minimum(tent, ramp)
        tents.append(tent)
        total[line.kept] += tent
    return [tent / total[line.kept] for tent, line in zip(tents, lines, strict=True)]


def grid(rows: list[Line], columns: list[Line]) -> Iterator[Window]:
    """Every window, row by row."""
    return (Window(*pair) for pair in product(rows, columns))


def cost(rows: list[Line], columns: list[Line]) -> float:
    """Pixels seen / pixels of the picture: how many times the work of one whole pass the windows are."""
    seen: list[int] = [sum(line.seen.stop - line.seen.start for line in lines) for lines in (rows, columns)]
    kept: list[int] = [lines[-1].kept.stop for lines in (rows, columns)]
    return seen[0] * seen[1] / (kept[0] * kept[1])
