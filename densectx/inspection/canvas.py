"""A sheet to draw on: smooth edges by drawing larger and shrinking, crisp text on top."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import dist
from typing import Final, TypeAlias, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from densectx.inspection.colours import INK, PAPER, Colour

_FINE: Final = 4  # pixels that one of the finished picture is drawn with, along each axis
EDGE: Final = 28
"""Free space around everything."""
TITLE, LABEL, SMALL = 19, 15, 13
"""Sizes of text."""

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the finished picture."""


@final
class Canvas:
    """Shapes in the order in which they are drawn, text above all of them. Coordinates are pixels, from top left.

    Args:
        width: of the finished picture.
        height: of it.
    """

    def __init__(self, width: float, height: float) -> None:
        size = round(width), round(height)
        self._fine = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), PAPER)
        self._draw = ImageDraw.Draw(self._fine)
        self._texts: list[tuple[float, float, str, int, Colour, str]] = []

    def rectangle(self, box: Box, fill: Colour | None, outline: Colour | None = None, width: float = 1) -> None:
        """A filled box, an outline inside of it, or both."""
        left, top, right, bottom = (round(v * _FINE) for v in box)
        if right > left and bottom > top:
            line = max(1, round(width * _FINE))
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=fill, outline=outline, width=line)

    def dot(self, x: float, y: float, radius: float, fill: Colour, outline: Colour | None = None) -> None:
        """A disc, with a rim of one pixel around it if it has an outline."""
        for r, colour in ((radius + 1, outline), (radius, fill)):
            if colour is not None:
                self._draw.ellipse([round(v * _FINE) for v in (x - r, y - r, x + r, y + r)], fill=colour)

    def line(self, points: Sequence[tuple[float, float]], fill: Colour, width: float = 1, dash: float = 0) -> None:
        """Straight lines from point to point, each in dashes of about a length, if given, with one at both ends."""
        for start, end in pairwise(points):
            steps = max(1, round(dist(start, end) / dash / 2)) * 2 - 1 if dash else 1
            for step in range(0, steps, 2):
                places = [
                    tuple(round((p + (q - p) * at / steps) * _FINE) for p, q in zip(start, end, strict=True))
                    for at in (step, step + 1)
                ]
                self._draw.line(places, fill=fill, width=max(1, round(width * _FINE)))

    def picture(self, pixels: NDArray[np.uint8], box: Box) -> None:
        """(h, w, 3) sRGB stretched over a box: pixels stay squares where it is larger, are averaged where smaller."""
        left, top, right, bottom = (round(v * _FINE) for v in box)
        size = max(1, right - left), max(1, bottom - top)
        smaller = size[0] < pixels.shape[1] or size[1] < pixels.shape[0]
        image = Image.fromarray(pixels)
        image = image.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)
        self._fine.paste(image, (left, top))

    def text(self, x: float, y: float, words: str, size: int, fill: Colour = INK, anchor: str = "lm") -> None:
        """Words at a point; ``anchor`` as Pillow's: l, m or r, then a, m, s (baseline) or d."""
        self._texts.append((x, y, words, size, fill, anchor))

    def finish(self) -> Image.Image:
        """The picture, RGB."""
        image = self._fine.reduce(_FINE)
        draw = ImageDraw.Draw(image)
        for x, y, words, size, fill, anchor in self._texts:
            draw.text((round(x), round(y)), words, fill=fill, font=ImageFont.load_default(size), anchor=anchor)
        return image


def text_width(words: str, size: int) -> int:
    """Pixels that words take."""
    return round(ImageFont.load_default(size).getlength(words))
