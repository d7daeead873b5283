"""Pictures to begin with: drawn here, and photographs where scikit-image is installed."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from functools import partial
from math import sin
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from densectx.data.mosaic import SOURCES, Mosaic

Pixels: TypeAlias = NDArray[np.uint8]

_SIDE: Final = 320  # of a photograph's longer side
_SMALL: Final = 128
_SIGMA: Final = 25.0


class Example(NamedTuple):
    """A picture to begin with.

    Attributes:
        title: in words.
        make: draws it, (H, W, 3) or (H, W).
    """

    title: str
    make: Callable[[], Pixels]


def examples() -> dict[str, Example]:
    """By the name that the page asks for them."""
    found = {
        "landscape": Example("Drawn landscape", landscape),
        "landscape-noisy": Example("Noisy landscape", lambda: noisy(landscape())),
    }
    if importlib.util.find_spec("skimage") is None:
        return found | {
            "landscape-small": Example("Small landscape", lambda: landscape(_SMALL)),
            "landscape-gray": Example("Gray landscape", lambda: gray(landscape())),
        }
    return {
        "scene": Example("Scene of photographs", scene),
        "coffee-noisy": Example("Noisy cup", lambda: noisy(photograph("coffee"))),
        "rocket-small": Example("Small rocket", partial(photograph, "rocket", _SMALL)),
        "chelsea-gray": Example("Gray cat", lambda: gray(photograph("chelsea"))),
        **found,
    }


def png(pixels: Pixels) -> bytes:
    """As a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def photograph(name: str, side: int = _SIDE) -> Pixels:
    """A photograph that scikit-image ships (terms: :data:`densectx.data.mosaic.SOURCES`), its longer side as given."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    with Image.open(Path(spec.origin).parent / "data" / SOURCES[name].file) as file:
        image = file.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.array(image)


def scene() -> Pixels:
    """A scene of the data set ``mosaic``, of the part that is not trained on."""
    image = Mosaic(split="val", size=(240, 320), regions=(4, 6), seed=3)[1]["image"]
    levels: Pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return levels


def noisy(pixels: Pixels) -> Pixels:
    """With noise N(0, 25^2) on the 0..255 scale, rounded and clipped to 8 bits."""
    noise = np.random.default_rng(0).standard_normal(pixels.shape) * _SIGMA
    found: Pixels = (pixels + noise).round().clip(0, 255).astype(np.uint8)
    return found


def gray(pixels: Pixels) -> Pixels:
    """Its luma, (H, W)."""
    return np.array(Image.fromarray(pixels).convert("L"))


def landscape(width: int = _SIDE) -> Pixels:
    """Hills, a lake, trees and a house under an evening sky, 4 by 3."""
    fine, height = 4 * width, 3 * width
    rows = np.linspace(0, 1, height)[:, None, None]
    top, bottom = np.array([58, 96, 158.0]), np.array([250, 205, 160.0])
    sky = top + (bottom - top) * np.minimum(rows * 1.7, 1)
    image = Image.fromarray(np.broadcast_to(sky, (height, fine, 3)).round().astype(np.uint8))
    draw, unit = ImageDraw.Draw(image), fine / 100

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x * unit, y * unit) for x, y in points]

    draw.ellipse(at((70, 12), (82, 24)), fill=(255, 238, 200))
    for base, swing, phase, colour in ((40, 6, 0.3, (118, 128, 160)), (46, 4, 2.1, (86, 112, 120))):
        ridge = [(i, base + swing * (sin(i / 11 + phase) + sin(i / 3.7 + phase) / 3)) for i in range(101)]
        draw.polygon(at(*ridge, (100, 75), (0, 75)), fill=colour)
    draw.polygon(at((0, 56), (30, 53), (62, 57), (100, 52), (100, 75), (0, 75)), fill=(92, 132, 74))
    draw.ellipse(at((8, 59), (58, 71)), fill=(108, 150, 182))
    for line in range(8):
        draw.line(at((16 + line * 2, 61 + line), (38 + line * 1.5, 61 + line)), fill=(150, 184, 206), width=2)
    draw.polygon(at((66, 50), (74, 43), (82, 50)), fill=(150, 62, 48))
    draw.rectangle(at((67, 50), (81, 60)), fill=(226, 208, 180))
    draw.rectangle(at((72.5, 54), (75.5, 60)), fill=(96, 66, 50))
    for left in (69, 77.5):
        draw.rectangle(at((left, 52), (left + 2.4, 54.4)), fill=(70, 96, 120))
    for x, y, size in ((88, 62, 5), (94, 66, 6), (61, 63, 4), (4, 60, 4.5)):
        draw.rectangle(at((x - 0.5, y), (x + 0.5, y + size * 0.7)), fill=(86, 62, 44))
        for step in range(3):
            wide, high = size * (0.6 - step * 0.13), y - step * size * 0.55
            draw.polygon(at((x - wide, high), (x, high - size), (x + wide, high)), fill=(38, 84 + 9 * step, 58))
    return np.array(image.resize((width, width * 3 // 4), Image.Resampling.BOX))
