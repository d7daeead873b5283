"""Pictures of what the numbers say: the paper's figure 1, growth of the field, heat maps, galleries of kernels.

Everything is drawn from what is computed; the same arguments give the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, isfinite
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densectx.errors import ConfigError
from densectx.inspection.canvas import EDGE, LABEL, TITLE, Canvas, text_width
from densectx.inspection.colours import BLUE, EMPTY, GREEN, MUTED, PAPER, RED, Colour, shades
from densectx.inspection.coverage import Coverage, coverage
from densectx.inspection.maps import gallery_picture, heat_map

__all__ = ["figure1", "gallery_picture", "growth", "heat_map"]

_ZOOM: Final = 9  # width of an enlarged panel of figure 1, relative to the field in it


def figure1(dilations: Sequence[int] = (1, 2, 4), kernel: int = 3) -> Image.Image:
    """A stack of dilated convolutions, a panel a layer, as figure 1 of Yu & Koltun (2016).

    Red dots are the taps of the layer. The cells that one output is connected to are blue, those that the layer's
    central tap is connected to green: what each red dot brings along. Cells of the field that no path leads to stay
    gray. All panels have one scale, but those of very small fields, which say how far they are enlarged.

    Args:
        dilations: of the layers, in order; (1, 2, 4) are the paper's.
        kernel: taps along each axis.

    Raises:
        ConfigError: no dilations, or a dilation or kernel below 1.
    """
    if not dilations:
        raise ConfigError("a figure of no layers: give at least one dilation.")
    cells = coverage(dilations, kernel).field + 2
    panel, gap, head = min(40.0 * cells, 340.0), 40, 56
    rows = ceil(len(dilations) / 4)
    columns = ceil(len(dilations) / rows)
    entries = [("taps of the layer", RED), ("what one tap sees", GREEN), ("what the layer sees", BLUE)]
    ends = [0.0]
    for name, _ in entries:
        ends.append(ends[-1] + 24 + text_width(name, LABEL) + 28)
    bottom = EDGE + rows * (head + panel + gap)
    canvas = Canvas(2 * EDGE + max(columns * (panel + gap) - gap, ends[-1] - 28), bottom + 18 + EDGE)
    for layer, dilation in enumerate(dilations):
        left, top = EDGE + layer % columns * (panel + gap), EDGE + layer // columns * (head + panel + gap)
        below, now = coverage(dilations[:layer], kernel), coverage(dilations[: layer + 1], kernel)
        canvas.text(left, top + 9, f"layer {layer + 1}, dilation {dilation}", TITLE)
        shown = _ZOOM * now.field if 2 * _ZOOM * now.field <= cells else cells
        notes = [f"field {now.field} x {now.field}"]
        notes += [f"{now.connected**2} of {now.field**2} cells"] if now.connected < now.field else []
        notes += [f"enlarged {cells / shown:.1f} times"] if shown < cells else []
        canvas.text(left, top + 36, ", ".join(notes), LABEL, MUTED)
        _panel(canvas, (left, top + head, panel / shown), shown, below, now, dilation, kernel)
    for number, ((name, colour), start) in enumerate(zip(entries, ends, strict=False)):
        x, y = EDGE + start, bottom + 8
        if number:
            canvas.rectangle((x, y - 8, x + 16, y + 8), colour)
        else:
            canvas.dot(x + 8, y, 6, colour)
        canvas.text(x + 24, y, name, LABEL)
    return canvas.finish()


def growth(fields: Sequence[tuple[str, float]], title: str = "Receptive field", unit: str = "cells") -> Image.Image:
    """The field of each layer of a network, as nested squares and as bars.

    Args:
        fields: name and side of the field of each layer, in order; infinite where it is global.
        title: above the picture.
        unit: of the sides.

    Raises:
        ConfigError: no layers, or a field that is no positive number.
    """
    if not fields or not all(side > 0 for _, side in fields):
        raise ConfigError(f"fields {list(fields)}: expected at least one layer, and positive sides.")
    sides = [side for _, side in fields]
    largest = max((side for side in sides if isfinite(side)), default=1.0)
    share = 0.8 / largest if inf in sides else 1 / largest  # of the space; what is global fills it all
    row, bar, top = 26, 340, EDGE + 48
    body = max(260, row * len(fields))
    square = min(body, 340)
    start = EDGE + square + 44 + max(text_width(name, LABEL) for name, _ in fields) + 14
    canvas = Canvas(start + bar + 76 + EDGE, top + body + EDGE)
    canvas.text(EDGE, EDGE + 10, title, TITLE)
    canvas.text(EDGE + text_width(title, TITLE) + 12, EDGE + 11, f"side in {unit}", LABEL, MUTED)
    colours = shades(len(fields))
    x, y = EDGE + square / 2, top + square / 2
    for side, colour in sorted(zip(sides, colours, strict=True), key=lambda pair: -pair[0]):
        half = square / 2 * (1 if side == inf else side * share)
        canvas.rectangle((x - half, y - half, x + half, y + half), colour, PAPER)
    for number, ((name, side), colour) in enumerate(zip(fields, colours, strict=True)):
        y = top + (number + 0.5) * row
        length = bar * (1 if side == inf else side * share)
        canvas.text(start - 14, y, name, LABEL, anchor="rm")
        canvas.rectangle((start, y - 8, start + max(length, 1), y + 8), colour)
        canvas.text(start + length + 8, y, "global" if side == inf else f"{side:g}", LABEL, MUTED)
    return canvas.finish()


def _panel(
    canvas: Canvas,
    place: tuple[float, float, float],
    cells: int,
    below: Coverage,
    now: Coverage,
    dilation: int,
    kernel: int,
) -> None:
    """One layer on a square of cells, given left, top and side of a cell: its field, what one tap sees, its taps."""
    colours = np.empty((cells, cells, 3), np.uint8)
    colours[:] = EMPTY
    first = (cells - now.field) // 2
    _paint(colours, first, now.taps, BLUE)
    _paint(colours, first + (kernel - 1) // 2 * dilation, below.taps, GREEN)
    (left, top, cell), side = place, cells * place[2]
    canvas.picture(colours, (left, top, left + side, top + side))
    if cell >= 5:  # smaller ones would be all lines
        for at in (number * cell for number in range(cells + 1)):
            canvas.line([(left + at, top), (left + at, top + side)], PAPER)
            canvas.line([(left, top + at), (left + side, top + at)], PAPER)
    places = [(first + tap * dilation + below.field / 2) * cell for tap in range(kernel)]
    radius = min(max(0.27 * cell, 2.2), 0.45 * dilation * cell)
    for y in places:
        for x in places:
            canvas.dot(left + x, top + y, radius, RED)


def _paint(colours: NDArray[np.uint8], first: int, taps: Sequence[bool], colour: Colour) -> None:
    """Colour the pairs of connected taps, of which the first one lies at ``first``, in both axes."""
    places = first + np.flatnonzero(taps)
    colours[np.ix_(places, places)] = colour
