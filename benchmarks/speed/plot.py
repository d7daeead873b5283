"""The figures as one SVG: ratios as bars, growth as lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

WIDTH, LEFT, ROW, GAP = 960, 430, 18, 34
SHOWN = ("segmentation", "sharing", "restoration")
BLUE, GRAY, ORANGE, RED = "#1d5fbf", "#9aa1ad", "#b4540a", "#b3261e"
COLOURS = (BLUE, ORANGE, "#17703c", "#8a3ffc")


def plot(found: dict[str, Any]) -> str:
    """An SVG file; sections that were not run are not drawn."""
    sections = found["sections"]
    bars = [
        (f"{row['what']}: {name}", ratio["time"], ratio.get("macs"))
        for key in SHOWN
        for row in sections.get(key, {}).get("comparisons", ())
        for name, ratio in row["ratios"].items()
    ]
    curves = sections.get("growth", {}).get("curves", [])
    parts, top = [], 20.0
    if bars:
        drawn, top = _bars(bars, top)
        parts += drawn
    if curves:
        drawn, top = _curves(curves, top)
        parts += drawn
    quick = any(section["quick"] for section in sections.values())
    if quick:
        parts.append(_text(WIDTH - 12, 16, "quick run: these figures mean nothing", "end", RED))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" role="img"'
        ' font-family="system-ui, sans-serif" font-size="12"><title>Speed</title>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _text(x: float, y: float, words: str, anchor: str = "start", fill: str = "#1b1d22", weight: int = 400) -> str:
    style = f'text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def _bars(bars: Sequence[tuple[str, float, float | None]], top: float) -> tuple[list[str], float]:
    """Time ratios, each above its multiply-add ratio."""
    largest = max(1.25, *(max(time, macs or 0.0) for _, time, macs in bars))
    scale = (WIDTH - LEFT - 60) / largest
    parts = [_text(12, top + 4, "ours / theirs: less is faster", weight=600)]
    parts += [
        _text(LEFT, top + 4, "time", fill=BLUE, weight=600),
        _text(LEFT + 40, top + 4, "multiply-adds", fill=GRAY),
    ]
    y = top + 18
    for label, time, macs in bars:
        parts.append(_text(LEFT - 10, y + 13, label, "end"))
        height = ROW - 7 if macs else ROW
        parts.append(f'<rect x="{LEFT}" y="{y:.1f}" width="{time * scale:.1f}" height="{height}" fill="{BLUE}"/>')
        if macs:
            at = y + height
            parts.append(f'<rect x="{LEFT}" y="{at:.1f}" width="{macs * scale:.1f}" height="7" fill="{GRAY}"/>')
        parts.append(_text(LEFT + max(time, macs or 0.0) * scale + 6, y + 13, f"{time:.2f}"))
        y += ROW + 8
    one = LEFT + scale
    parts.append(f'<path d="M{one:.1f} {top + 12:.1f}V{y:.1f}" stroke="{RED}" stroke-dasharray="4 3"/>')
    return parts, y + GAP


def _curves(curves: Sequence[dict[str, Any]], top: float) -> tuple[list[str], float]:
    """Time over what grows, side by side, both relative to the first; pixels on logarithmic axes."""
    height, parts = 230.0, []
    kinds = list(dict.fromkeys(curve["over"] for curve in curves))
    room = (WIDTH - 40) / len(kinds)
    for column, kind in enumerate(kinds):
        mine = [curve for curve in curves if curve["over"] == kind]
        left, right = 60 + column * room, (column + 1) * room - 10
        bottom = top + height
        log = mine[0]["x"][-1] > 10
        lines = [
            [(x, arm["median_s"] / list(c["arms"].values())[0]["median_s"])  # noqa: RUF015
             for x, arm in zip(c["x"], c["arms"].values(), strict=True)] for c in mine
        ]  # fmt: skip
        xs, ys = ([point[i] for line in lines for point in line] for i in (0, 1))
        across, up = (
            _axis(min(xs), max(xs), left, right, log),
            _axis(min(ys) if log else 0, max(ys), bottom, top + 40, log),
        )
        parts.append(f'<path d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}" fill="none" stroke="#5d626d"/>')
        parts += [_text(across(x), bottom + 16, f"{x:g}", "middle") for x in mine[0]["x"]]
        ticks = mine[0]["x"] if log else _ticks(max(ys))
        parts += [_text(left - 6, up(y) + 4, f"{y:g}", "end") for y in ticks if y <= max(ys) * 1.01]
        if log:
            parts.append(_path([(across(x), up(x)) for x in mine[0]["x"] if min(ys) <= x <= max(ys)], GRAY, "5 4"))
        for index, (curve, points) in enumerate(zip(mine, lines, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            parts.append(_path([(across(x), up(y)) for x, y in points], colour))
            parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
            parts.append(_text(left + 10, top + 14 + 16 * index, curve["what"], fill=colour))
        words = f"{kind}, times the first (dashed: in proportion)" if log else kind
        parts.append(_text((left + right) / 2, bottom + 34, f"{words}; time, the first = 1", "middle", weight=600))
    return parts, top + height + 34 + GAP / 2


def _axis(low: float, high: float, start: float, end: float, log: bool) -> Any:
    if log:
        low, high = math.log(low), math.log(high)
    width = (high - low) or 1.0
    return lambda value: start + (end - start) * ((math.log(value) if log else value) - low) / width


def _ticks(largest: float) -> list[float]:
    step = next(s for s in (0.25, 0.5, 1, 2, 5, 10, 1e9) if largest / s <= 6)
    return [step * i for i in range(int(largest / step) + 1)]


def _path(points: Sequence[tuple[float, float]], colour: str, dashes: str = "") -> str:
    words = "".join(f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" for (a, b), (c, d) in pairwise(points))
    return f'<path d="{words}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
