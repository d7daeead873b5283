"""Colours of the pictures: a small palette, and scales whose lightness is proportional to the number shown."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Colour: TypeAlias = tuple[int, int, int]

PAPER: Final[Colour] = (250, 250, 250)
INK: Final[Colour] = (32, 33, 38)
MUTED: Final[Colour] = (104, 107, 117)
FRAME: Final[Colour] = (206, 208, 214)
EMPTY: Final[Colour] = (234, 235, 239)
RED: Final[Colour] = (214, 40, 57)
BLUE: Final[Colour] = (168, 203, 236)
DEEP_BLUE: Final[Colour] = (45, 108, 178)
GREEN: Final[Colour] = (122, 196, 146)

_STOPS: Final = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
# lightness, chroma and hue (degrees) in OKLCh at the stops: night blue, blue, teal, green, pale yellow
_SEQUENTIAL: Final = np.array(
    [[0.22, 0.08, 285], [0.41, 0.13, 265], [0.60, 0.105, 205], [0.79, 0.15, 150], [0.98, 0.09, 105]]
)
_DIVERGING: Final = np.array(
    [[0.45, 0.15, 255], [0.72, 0.10, 250], [0.98, 0.0, 140], [0.72, 0.13, 30], [0.45, 0.18, 25]]
)


def sequential(values: ArrayLike) -> NDArray[np.uint8]:
    """Numbers in 0..1 -> sRGB with one more axis of 3, from night blue (0) over teal to pale yellow (1)."""
    place = np.asarray(values, np.float64)
    knots = [np.interp(place, _STOPS, column) for column in _SEQUENTIAL.T]
    return _srgb(knots[0], *_plane(knots[1], knots[2]))


def diverging(values: ArrayLike) -> NDArray[np.uint8]:
    """Numbers in -1..1 -> sRGB with one more axis of 3, from blue (-1) over near white (0) to red (1)."""
    place = (np.asarray(values, np.float64) + 1) / 2
    a, b = _plane(_DIVERGING[:, 1], _DIVERGING[:, 2])
    return _srgb(*(np.interp(place, _STOPS, column) for column in (_DIVERGING[:, 0], a, b)))


def shades(count: int) -> list[Colour]:
    """Blues from dark to light, evenly spaced in lightness."""
    place = np.linspace(0, 1, count) if count > 1 else np.full(1, 0.5)
    lightness, chroma = 0.40 + 0.48 * place, 0.13 - 0.08 * place
    return [(int(r), int(g), int(b)) for r, g, b in _srgb(lightness, *_plane(chroma, np.full(count, 255.0)))]


def _plane(chroma: NDArray[np.float64], hue: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Polar coordinates of a colour, hue in degrees, to OKLab's a and b."""
    return chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))


def _srgb(lightness: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.uint8]:
    """OKLab (Ottosson 2020) to 8-bit sRGB, clipped to the gamut."""
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        -1,
    )
    matrix = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(cones**3 @ matrix.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    levels: NDArray[np.uint8] = np.rint(encoded * 255).astype(np.uint8)
    return levels
