"""Lines over steps as SVG that follows the page's colours and says its numbers to those who do not see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple, final

from densectx.report.formats import number
from densectx.report.history import Series
from densectx.report.markup import Html, tag

_WIDTH, _HEIGHT = 440.0, 232.0  # of the drawing, in its own units: pixels at full size
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 12.0, 30.0
_DRAWN: Final = 240  # points of a line at most; more are averaged
_MARKED: Final = 30  # points from which on a line has no dots any more
_NOISY: Final = 60  # points from which on a smoothed line lies above the measured one
_DECADES: Final = 30.0  # ratio of the largest to the smallest value from which on the axis is logarithmic
_CHARACTER: Final = 6.6  # width of a digit of the labels


@final
class Line(NamedTuple):
    """What a chart shows.

    Attributes:
        name: for the legend.
        series: its points.
        baseline: whether it is the trivial answer, which is dashed.
        smooth: whether it is a loss or the like: noisy, so that many points are smoothed, and of any scale.
    """

    name: str
    series: Series
    baseline: bool = False
    smooth: bool = False


def chart(title: str, lines: Sequence[Line], identity: str, *, zero: bool = False, over: str = "step") -> Html:
    """A figure with a heading, a legend if there are several lines, and the drawing.

    Args:
        title: what is drawn.
        lines: at least one, each with at least one point.
        identity: unique in the page, for references inside of the drawing.
        zero: whether a line at 0 is drawn (for values whose sign matters).
        over: what the places along the axis are called.
    """
    values = [value for line in lines for value in line.series.values]
    steps = [step for line in lines for step in line.series.steps]
    across = _Axis(min(steps), max(steps), _LEFT, _WIDTH - _RIGHT, whole=True)
    low, high = (min([0.0, *values]), max([0.0, *values])) if zero else (min(values), max(values))
    log = all(line.smooth for line in lines) and not zero and low > 0 and high / low > _DECADES
    up = _Axis(low, high, _HEIGHT - _BOTTOM, _TOP, log=log)
    parts: list[Html] = [_grid(across, up)]
    if zero:
        parts.append(tag("path", d=f"M{_LEFT} {up(0):.1f}H{_WIDTH - _RIGHT}", class_="zero"))
    for index, line in enumerate(lines):
        parts += _drawn(line, index, across, up, over)
    drawing = tag(
        "svg",
        tag("title", title, id=f"{identity}-t"),
        tag("desc", " ".join(_said(line, over) for line in lines), id=f"{identity}-d"),
        parts,
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_labelledby=f"{identity}-t",
        aria_describedby=f"{identity}-d",
        class_="chart",
    )
    legend = tag("ul", [_entry(line, index) for index, line in enumerate(lines)], class_="legend")
    caption = tag("figcaption", title, tag("small", " logarithmic") if log else None)
    return tag("figure", caption, legend if len(lines) > 1 else None, drawing, class_="plot")


def sparkline(series: Series) -> Html:
    """A small line without axes, decoration beside a number."""
    across = _Axis(series.steps[0], series.steps[-1], 4, 116, whole=True)
    up = _Axis(min(series.values), max(series.values), 30, 4)
    points = [(across(s), up(v)) for s, v in zip(series.steps, series.values, strict=True)]
    return tag(
        "svg",
        tag("path", d=_path(points), class_="line s0"),
        tag("circle", cx=f"{points[-1][0]:.1f}", cy=f"{points[-1][1]:.1f}", r="3", class_="dot s0"),
        viewBox="0 0 120 34",
        aria_hidden="true",
        class_="spark",
    )


@final
class _Axis:
    """From values to places in the drawing, with ticks at round numbers."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, whole: bool = False, log: bool = False
    ) -> None:
        self.start, self.end, self.log = start, end, log
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(1.0, abs(high)):  # a constant: in the middle
            margin = 1.0 if whole or log else max(abs(high), 1e-3) * 0.1
            low, high = low - margin, high + margin
        elif not whole:
            low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
        self.low, self.high = low, high
        self.ticks = self._log_ticks() if log else _round_numbers(low, high, whole)

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return self.start + (self.end - self.start) * (place - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        """A tick's number with the decimals that tell it from its neighbours."""
        largest, step = max(map(abs, self.ticks)), min((b - a for a, b in pairwise(self.ticks)), default=0.0)
        if self.log or step <= 0 or not 1e-3 <= largest < 1e6:
            text = f"{tick:.4g}".replace("e-0", "e-").replace("e+0", "e+")
        else:
            text = f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
        return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text

    def _log_ticks(self) -> list[float]:
        decades = range(math.ceil(self.low), math.floor(self.high) + 1)
        if len(decades) > 1:
            ticks = [10.0**power for power in decades[:: max(1, math.ceil(len(decades) / 5))]]
            return [tick for tick in ticks if tick > 0]  # 10 ** -326 is 0
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        ticks = [m * 10.0**power for power in powers for m in (1, 2, 5)]
        return [tick for tick in ticks if tick > 0 and self.low <= math.log10(tick) <= self.high]


def _round_numbers(low: float, high: float, whole: bool) -> list[float]:
    """Three to seven multiples of 1, 2 or 5 times a power of ten within a range; of whole numbers perhaps fewer."""
    power = 10.0 ** math.floor(math.log10(high - low))
    for step in (m * power for m in (5, 2, 1, 0.5, 0.2, 0.1)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first >= 2 or (whole and step <= 1):
            break
    return [index * step for index in range(first, last + 1)]


def _grid(across: _Axis, up: _Axis) -> Html:
    parts = []
    for tick in up.ticks:
        y = up(tick)
        parts.append(tag("path", d=f"M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}", class_="grid"))
        parts.append(tag("text", up.label(tick), x=_LEFT - 8, y=f"{y + 4:.1f}", text_anchor="end"))
    for tick in across.ticks:
        x, text = across(tick), f"{tick:g}"
        half = len(text) * _CHARACTER / 2
        x = min(max(x, half), _WIDTH - half - 1)
        parts.append(tag("text", text, x=f"{x:.1f}", y=_HEIGHT - 8, text_anchor="middle"))
    parts.append(tag("path", d=f"M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}", class_="axis"))
    return tag("g", parts, aria_hidden="true")


def _drawn(line: Line, index: int, across: _Axis, up: _Axis, over: str) -> list[Html]:
    series = _thinned(line.series)
    points = [(across(s), up(v)) for s, v in zip(series.steps, series.values, strict=True)]
    colour = f"s{index % 6}"
    if line.baseline:
        return [tag("path", d=_path(points), class_=f"line dashed {colour}")]
    if line.smooth and len(points) > _NOISY:
        smoothed = _smoothed(series.values)
        above = [(across(s), up(v)) for s, v in zip(series.steps, smoothed, strict=True)]
        return [
            tag("path", d=_path(points), class_=f"line faint {colour}"),
            tag("path", d=_path(above), class_=f"line {colour}"),
        ]
    parts = [tag("path", d=_path(points), class_=f"line {colour}")]
    if len(points) <= _MARKED:
        for (x, y), step, value in zip(points, series.steps, series.values, strict=True):
            tip = tag("title", f"{over} {step}: {number(value)}")
            parts.append(tag("circle", tip, cx=f"{x:.1f}", cy=f"{y:.1f}", r="3", class_=f"dot {colour}"))
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _thinned(series: Series) -> Series:
    """At most so many points: means of neighbours."""
    count = len(series.steps)
    if count <= _DRAWN:
        return series
    ends = [round(index * count / _DRAWN) for index in range(_DRAWN + 1)]
    groups = [slice(a, b) for a, b in pairwise(ends)]
    means = (sum(series.values[g]) / len(series.values[g]) for g in groups)
    return Series(tuple(series.steps[g][-1] for g in groups), tuple(means))


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twelfth of the points, unbiased at the begin."""
    keep = 1 - 12 / len(values)
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def _entry(line: Line, index: int) -> Html:
    swatch = "swatch dashed" if line.baseline else "swatch"
    return tag("li", tag("span", class_=f"{swatch} s{index % 6}", aria_hidden="true"), line.name)


def _said(line: Line, over: str) -> str:
    steps, values = line.series.steps, line.series.values
    ends = f"{number(values[0])} at {over} {steps[0]}"
    ends += f" to {number(values[-1])} at {over} {steps[-1]}" if len(values) > 1 else ""
    return f"{line.name}: {len(values)} points, {ends}, least {number(min(values))}, greatest {number(max(values))}."
