"""Maps of numbers as pictures: a field as a heat map, kernels side by side."""

from __future__ import annotations

from math import log10
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from densectx.errors import ConfigError, NumericError
from densectx.inspection.canvas import EDGE, LABEL, SMALL, TITLE, Box, Canvas, text_width
from densectx.inspection.colours import DEEP_BLUE, FRAME, MUTED, PAPER, RED, diverging, sequential
from densectx.inspection.kernels import Gallery, ranks, spectra

_SIDE: Final = 460  # of a heat map
_FLOOR: Final = -6  # of the spectra, a power of ten
_STROKES: Final = ((PAPER, 4.0), (RED, 2.0))  # a red line with a light rim, seen on every colour


def heat_map(
    values: Tensor | NDArray[np.floating],
    title: str = "",
    *,
    field: float | None = None,
    effective: float | None = None,
    centre: tuple[float, float] | None = None,
) -> Image.Image:
    """A map of numbers in colours, with a bar that says what they mean.

    Args:
        values: (H, W).
        title: above the map.
        field: side of the theoretical field in cells of the map, drawn as a square.
        effective: side of the effective field, drawn as a dashed square.
        centre: row and column of the middle of the squares; the middle of the map if not given.

    Raises:
        ConfigError: another number of axes, or an empty map.
        NumericError: a value is not finite.
    """
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
    if array.ndim != 2 or not array.size:
        raise ConfigError(f"a heat map of shape {array.shape}: expected (H, W).")
    if not np.isfinite(array).all():
        raise NumericError("a heat map of numbers that are not finite (NaN or infinity).")
    height, width = array.shape
    cell, top = _SIDE / max(height, width), EDGE + (40 if title else 0)
    box = (float(EDGE), float(top), EDGE + width * cell, top + height * cell)
    squares = [
        (f"{name} {side:.4g} x {side:.4g}{', beyond the map' * (side > max(height, width))}", side * cell / 2, dashes)
        for name, side, dashes in (("theoretical field", field, False), ("effective field", effective, True))
        if side is not None
    ]
    words = max([text_width(title, TITLE), *(46 + text_width(name, LABEL) for name, _, _ in squares)])
    canvas = Canvas(max(box[2] + 96, EDGE + words) + EDGE, box[3] + 28 + 26 * len(squares) + EDGE - 8)
    canvas.text(EDGE, EDGE + 10, title, TITLE)
    low, high = float(array.min()), float(array.max())
    canvas.picture(sequential((array - low) / (high - low) if high > low else np.zeros_like(array)), box)
    canvas.text(box[0], box[3] + 14, f"{height} x {width}", SMALL, MUTED)
    row, column = centre if centre is not None else ((height - 1) / 2, (width - 1) / 2)
    x, y = box[0] + (column + 0.5) * cell, box[1] + (row + 0.5) * cell
    for number, (name, half, dashes) in enumerate(squares):
        _square(canvas, (x - half, y - half, x + half, y + half), box, dashes=dashes)
        line = box[3] + 44 + 26 * number
        canvas.rectangle((EDGE, line - 9, EDGE + 34, line + 9), (62, 88, 130))
        for colour, thick in _STROKES:
            canvas.line([(EDGE + 4, line), (EDGE + 30, line)], colour, thick, dash=5 if dashes else 0)
        canvas.text(EDGE + 46, line, name, LABEL)
    _scale(canvas, (box[2] + 22, box[1], box[2] + 40, box[3]), low, high)
    return canvas.finish()


def gallery_picture(gallery: Gallery, title: str = "Kernels from few numbers") -> Image.Image:
    """Two rows of kernels, composed ones and ones of rank one, each with the singular values of its kernels.

    Blue is negative, red positive; each kernel has its own scale.

    Args:
        gallery: the kernels.
        title: above them.
    """
    count, side, _ = gallery.composed.shape
    few, separable, every = gallery.numbers
    rows = [
        (f"{few // 9} kernels of 3 x 3 composed: {few} numbers", gallery.composed),
        (f"outer products of two vectors: {separable} numbers", gallery.rank_one),
    ]
    thumb, gap, plot = 5.0 * max(side, 27), 14, 250
    right = EDGE + count * (thumb + gap) + 62
    block = thumb + 78
    canvas = Canvas(right + plot + EDGE, EDGE + 44 + 2 * block + EDGE - 30)
    canvas.text(EDGE, EDGE + 10, title, TITLE)
    note = f"{side} x {side}: {every} taps"
    canvas.text(EDGE + text_width(title, TITLE) + 14, EDGE + 11, note, LABEL, MUTED)
    for number, (words, kernels) in enumerate(rows):
        top = EDGE + 44 + number * block
        low, high = (int(value) for value in ranks(kernels).aminmax())
        canvas.text(EDGE, top + 12, f"{words}, rank {low if low == high else f'{low} to {high}'}", LABEL)
        for place, kernel in enumerate(kernels):
            left = EDGE + place * (thumb + gap)
            pixels = diverging((kernel / kernel.abs().max()).numpy())
            box = (left, top + 32, left + thumb, top + 32 + thumb)
            canvas.picture(pixels, box)
            canvas.rectangle(box, None, FRAME)
        canvas.text(right, top + 12, "singular values", LABEL)
        _spectrum(canvas, (right, top + 32, right + plot, top + 32 + thumb), spectra(kernels).numpy())
    return canvas.finish()


def _spectrum(canvas: Canvas, box: Box, values: NDArray[np.float64]) -> None:
    """(count, side) relative singular values on a logarithmic axis, a line a kernel; lines end at the floor."""
    left, top, right, bottom = box
    for power in range(0, _FLOOR - 1, -2):
        y = top + (bottom - top) * power / _FLOOR
        canvas.line([(left, y), (right, y)], FRAME)
        canvas.text(left - 8, y, f"1e{power}" if power else "1", SMALL, MUTED, "rm")
    step = (right - left - 8) / values.shape[1]
    for number in (1, *range(9, values.shape[1] + 1, 9)):
        canvas.text(left + number * step, bottom + 12, str(number), SMALL, MUTED, "mm")
    for spectrum in values:
        shown = [max(_FLOOR, log10(max(value, 1e-30))) for value in spectrum]
        last = next((n for n, power in enumerate(shown) if power <= _FLOOR), len(shown) - 1)
        points = [
            (left + (n + 1) * step, top + (bottom - top) * power / _FLOOR) for n, power in enumerate(shown[: last + 1])
        ]
        canvas.line(points, DEEP_BLUE, 1.25)
        for x, y in points[: last + (shown[last] > _FLOOR)]:
            canvas.dot(x, y, 1.75, DEEP_BLUE)


def _square(canvas: Canvas, square: Box, within: Box, *, dashes: bool) -> None:
    """The sides of a square, as far as they lie within a box, red with a light rim."""
    left, top, right, bottom = square
    x0, x1 = max(left, within[0]), min(right, within[2])
    y0, y1 = max(top, within[1]), min(bottom, within[3])
    sides = [((x0, y), (x1, y)) for y in (top, bottom) if within[1] <= y <= within[3] and x0 < x1]
    sides += [((x, y0), (x, y1)) for x in (left, right) if within[0] <= x <= within[2] and y0 < y1]
    for colour, width in _STROKES:
        for side in sides:
            canvas.line(side, colour, width, dash=7 if dashes else 0)


def _scale(canvas: Canvas, box: Box, low: float, high: float) -> None:
    """A bar of the colours with numbers from low (below) to high (above)."""
    canvas.picture(sequential(np.linspace(1, 0, 256))[:, None], box)
    for share in (0, 0.25, 0.5, 0.75, 1) if high > low else (0,):
        y = box[3] + (box[1] - box[3]) * share
        canvas.line([(box[2], y), (box[2] + 5, y)], MUTED)
        canvas.text(box[2] + 10, y, f"{low + (high - low) * share:.3g}", SMALL, MUTED)
