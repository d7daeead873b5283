"""Colours of classes."""

from __future__ import annotations

from typing import TypeAlias

Palette: TypeAlias = tuple[tuple[int, int, int], ...]
"""One (R, G, B) in 0..255 a class."""


def voc_palette(count: int) -> Palette:
    """PASCAL VOC's colours: the bits of an id spread over R, G and B, highest first (VOCdevkit, VOClabelcolormap)."""

    def channel(index: int, offset: int) -> int:
        return sum(((index >> (3 * bit + offset)) & 1) << (7 - bit) for bit in range(8))

    return tuple((channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(count))
