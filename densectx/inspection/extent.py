"""Where the positions of a map look, as a pattern that repeats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, final

import numpy as np

from densectx.inspection.spans import NONE, Bools, Spans

_ENOUGH: Final = 32  # positions away from all borders that a layer must have,
_PERIODS: Final = 4  # and that many periods of them
_PERIOD: Final = 512  # positions


class Unclear(Exception):
    """Too few positions are away from the borders, or no pattern repeats."""


@final
@dataclass(frozen=True)
class Extent:
    """Where the positions of a map look along one axis, in input pixels, away from borders.

    Position p of phase p mod ``period`` sees the pixels from ``floor(p / period) * step + first[phase]`` up to the
    same with ``last[phase]``, both included.

    Attributes:
        period: positions after which the pattern repeats.
        step: pixels that one period goes on by.
        first: one a phase.
        last: one a phase.
        causes: layers that make every position see everything along the axis beside that; empty for a finite field.
    """

    period: int
    step: int
    first: tuple[int, ...]
    last: tuple[int, ...]
    causes: tuple[str, ...] = ()

    @property
    def field(self) -> float:
        """Pixels that the widest phase spans; infinite where a layer is global."""
        return math.inf if self.causes else self.local

    @property
    def local(self) -> int:
        """The same without global layers."""
        return max(last - first + 1 for first, last in zip(self.first, self.last, strict=True))

    @property
    def stride(self) -> Fraction:
        """Pixels from one position to the next, in the mean over a period."""
        return Fraction(self.step, self.period)

    @property
    def offset(self) -> float:
        """Centre of what position 0 would see in an endless input, in pixels (pixel 0 has its centre at 0).

        The mean over phases of centre - stride * p: position p looks at ``offset + stride * p``, up to the phase.
        """
        centres = [(a + b) / 2 - self.stride * p for p, (a, b) in enumerate(zip(self.first, self.last, strict=True))]
        return float(sum(centres) / self.period)


def extent_of(spans: Spans, axis: int) -> Extent:
    """Of a map (B, C, H, W), all channels together, from its positions away from the borders.

    Args:
        spans: what it sees along an axis.
        axis: 0 for H, 1 for W.

    Raises:
        Unclear: a larger input is needed, or nothing repeats.
    """
    dim = spans.lo.ndim - 2 + axis
    if spans.lo.ndim != 4 or not spans.varies(dim):
        raise Unclear
    others = tuple(d for d in range(4) if d != dim)
    lo, hi = spans.lo.min(others), spans.hi.max(others)
    start, stop = _longest(np.asarray(spans.clean.all(others)))
    lo, hi = lo[start:stop], hi[start:stop]
    seen = lo < NONE
    for period in range(1, min(_PERIOD, len(lo) // _PERIODS) + 1):
        both = seen[period:] & seen[:-period]
        steps = np.concatenate([(a[period:] - a[:-period])[both] for a in (lo, hi)])
        if len(lo) < _ENOUGH or not len(steps) or bool((seen[period:] != seen[:-period]).any()):
            continue
        if steps[0] != 0 and bool((steps == steps[0]).all()):
            phases = [(-start + p) % period for p in range(period)]  # places in lo of phases 0, 1, ...
            base = [(start + at) // period * int(steps[0]) for at in phases]
            first = [int(lo[at]) - b if seen[at] else 0 for at, b in zip(phases, base, strict=True)]
            last = [int(hi[at]) - b if seen[at] else -1 for at, b in zip(phases, base, strict=True)]
            return Extent(period, int(steps[0]), tuple(first), tuple(last), spans.causes)
    raise Unclear


def _longest(flags: Bools) -> tuple[int, int]:
    """Start and end of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    if not len(edges):
        return 0, 0
    starts, stops = edges[::2], edges[1::2]
    at = int((stops - starts).argmax())
    return int(starts[at]), int(stops[at])
