"""A photograph under the colours of its classes, with a legend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_COLOUR, _SATURATION = 0.55, 0.35  # share of the class colour; how much colour the photograph keeps below it
_SHADOW = 36  # what black becomes: class colours stay apart in the dark
_PAPER, _INK, _FRAME = (250, 250, 250), (32, 32, 32), (150, 150, 150)


def overlay(
    photograph: NDArray[np.uint8],
    ids: NDArray[np.uint8],
    names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """Blend, outline and explain classes of which every pixel has one.

    Args:
        photograph: (h, w, 3) sRGB; enlarged to the size of ``ids``.
        ids: (H, W) class of each pixel.
        names: of the classes.
        palette: their colours.

    Returns:
        An RGB image at least W wide, the picture above a legend of the classes that occur, largest first; see
        :func:`legible`.
    """
    colours = np.asarray(palette, np.float32)[ids]
    counts = np.bincount(ids.ravel(), minlength=len(names))
    return _sheet(photograph, colours, np.True_, _edges(ids), counts, names, palette)


def overlay_labels(
    photograph: NDArray[np.uint8],
    labels: NDArray[np.bool_],
    names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """As :func:`overlay`, of classes that hold independently: where several hold their colours are mixed.

    Args:
        photograph: (h, w, 3) sRGB; enlarged to the size of ``labels``.
        labels: (K, H, W), where each class holds.
        names: of the classes.
        palette: their colours.

    Returns:
        As :func:`overlay`; the legend is empty where no class holds.
    """
    weights = labels.astype(np.float32)
    several = weights.sum(0)
    colours = np.tensordot(weights, np.asarray(palette, np.float32), (0, 0)) / np.maximum(several, 1)[..., None]
    edge = np.logical_or.reduce([_edges(label) for label in labels])
    counts = labels.sum((1, 2))
    return _sheet(photograph, colours, (several > 0)[..., None], edge, counts, names, palette)


def _sheet(
    photograph: NDArray[np.uint8],
    colours: NDArray[np.float32],
    covered: NDArray[np.bool_] | np.bool_,
    edge: NDArray[np.bool_],
    counts: NDArray[np.int64],
    names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """The photograph below colours (H, W, 3), where ``covered``, with edges (H, W), above a legend by counts (K,)."""
    height, width = edge.shape
    base = np.asarray(Image.fromarray(photograph).resize((width, height)), np.float32)
    base = base * _SATURATION + base.mean(2, keepdims=True) * (1 - _SATURATION)
    base = _SHADOW + base * (1 - _SHADOW / 255)
    mixed = np.where(covered, base * (1 - _COLOUR) + colours * _COLOUR, base)
    mixed[edge] = mixed[edge] * 0.35 + 255 * 0.65
    present = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    legend = _legend(
        [(names[i] if legible(names[i]) else str(i), palette[i]) for i in present],
        width,
        max(13, min(height, width) // 36),
    )
    sheet = Image.new("RGB", (max(width, legend.width), height + legend.height), _PAPER)
    sheet.paste(Image.fromarray(mixed.round().astype(np.uint8)), (0, 0))
    sheet.paste(legend, (0, height))
    return sheet


def _edges(ids: NDArray[np.uint8] | NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels whose lower or right neighbours, up to a thickness that grows with the picture, are of another class."""
    edge = np.zeros(ids.shape, np.bool_)
    for step in range(1, max(1, min(ids.shape) // 600) + 1):
        edge[:-step] |= ids[:-step] != ids[step:]
        edge[:, :-step] |= ids[:, :-step] != ids[:, step:]
    return edge


def legible(name: str) -> bool:
    """Whether the legend's font has all letters of a name, which else stands there as the number of its class."""
    return _lacking() not in map(_drawn, name)


@cache
def _lacking() -> bytes:
    """What is drawn for a letter that the font lacks."""
    return _drawn("\U0010ffff")  # no letter, and never one


def _drawn(letter: str) -> bytes:
    return bytes(ImageFont.load_default(13).getmask(letter))


def _legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int, size: int) -> Image.Image:
    """Rows of swatches with names, at least ``width`` wide and as high as it takes."""
    font = ImageFont.load_default(size)
    gap, row = round(size * 0.5), round(size * 1.7)
    swatch = round(size * 1.05)
    widths = [swatch + gap + round(font.getlength(name)) + 2 * gap for name, _ in entries]
    places, x, y = [], gap, gap
    for needed in widths:
        if x > gap and x + needed > width:
            x, y = gap, y + row
        places.append((x, y))
        x += needed
    legend = Image.new("RGB", (max([width, *(gap + w for w in widths)]), y + row + gap), _PAPER)
    draw = ImageDraw.Draw(legend)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        middle = top + row // 2
        box = (left, middle - swatch // 2, left + swatch, middle - swatch // 2 + swatch)
        draw.rounded_rectangle(box, radius=size // 5, fill=colour, outline=_FRAME)
        draw.text((left + swatch + gap, middle), name, fill=_INK, font=font, anchor="lm")
    return legend
