"""Why the samples of a split cannot be used, or may mean something else, by looking at their files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple, final

import numpy as np

from densectx.data.labels import read_mask
from densectx.data.pillow import ORIENTATION, opened
from densectx.errors import DataError
from densectx.types import SourceInfo

Colour = tuple[int, int, int]
_COLOURED: Final = ("RGB", "RGBA", "CMYK", "YCbCr")
_TURNED: Final = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_SHOWN: Final = 16  # ids that are kept of a file


@final
class Expected(NamedTuple):
    """What a config says of a source, as far as its files can be compared with it.

    Attributes:
        colours: masks are files of colours.
        direct: the ids of mask files are those of the classes.
        palette: the config or its preset declares the colours of the classes.
        batch: samples a training step.
        eval_batch: samples an evaluation step.
        fixed: whether augmentation gives training samples of one size.
    """

    colours: bool = False
    direct: bool = False
    palette: bool = False
    batch: int = 1
    eval_batch: int = 1
    fixed: bool = True


@final
class Cause(NamedTuple):
    """What is wrong with a sample's files.

    Attributes:
        kind: ``colours`` (a mask of colours where ids are expected), ``indices`` (the reverse), ``turned`` (height and
            width exchanged), ``ratio`` (a label of another size) or ``ids``.
        detail: share of the pixels with a declared colour, how many times as large a label is, or the ids.
    """

    kind: str
    detail: tuple[float, ...] = ()


def cause_of(paths: Mapping[str, str], info: SourceInfo, expected: Expected) -> Cause | None:
    """Of a sample that cannot be used; None where its files do not tell."""
    try:
        return _mode(paths, info, expected) or _size(paths, info) or _ids(paths, info, expected)
    except (DataError, OSError):  # which is what the sample's own message says
        return None


def _mode(paths: Mapping[str, str], info: SourceInfo, expected: Expected) -> Cause | None:
    if "mask" not in paths or paths["mask"].endswith((".mat", ".npy")):
        return None
    with opened(paths["mask"]) as image:
        if image.mode in _COLOURED and not expected.colours:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
            codes = pixels.astype(np.int64) @ np.array([65536, 256, 1])
            known = [red << 16 | green << 8 | blue for red, green, blue in info.palette]
            return Cause("colours", (float(np.isin(codes, known).mean()),))
        if image.mode in ("1", "L", "I;16") and expected.colours:
            return Cause("indices")
    return None


def _size(paths: Mapping[str, str], info: SourceInfo) -> Cause | None:
    label = paths.get("mask", paths.get("target"))
    if "image" not in paths or label is None or label.endswith((".mat", ".npy")):
        return None
    (height, width), (high, wide) = size_of_file(paths["image"]), size_of_file(label)
    wanted = height * info.scale, width * info.scale
    if (high, wide) == wanted:
        return None
    if (wide, high) == wanted:
        return Cause("turned")
    ratio = high / height, wide / width
    return Cause("ratio", (round(ratio[0], 4),)) if ratio[0] == ratio[1] else None


def _ids(paths: Mapping[str, str], info: SourceInfo, expected: Expected) -> Cause | None:
    if "mask" not in paths or not expected.direct or paths["mask"].endswith(".mat"):
        return None
    ids = np.unique(read_mask(paths["mask"]).numpy())
    strange = ids[(ids != info.ignore_index) & ((ids < 0) | (ids >= len(info.classes)))]
    return Cause("ids", tuple(float(i) for i in strange[:_SHOWN])) if len(strange) else None


def size_of_file(path: str) -> tuple[int, int]:
    """(height, width) as it is shown.

    Raises:
        DataError: the file cannot be opened.
    """
    with opened(path) as image:
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) in _TURNED  # Pillow turns those
        return (image.width, image.height) if turned else (image.height, image.width)


def palette_of_file(path: str) -> list[Colour]:
    """The colours of a palette file by index; empty for other files, and for a palette of grays, which says nothing."""
    if not path.lower().endswith((".png", ".tif", ".tiff", ".bmp")):
        return []
    try:
        with opened(path) as image:
            values = (image.getpalette("RGB") or []) if image.mode == "P" else []
    except DataError:  # ids that Pillow cannot hold; who cannot read them says so
        return []
    colours = [(values[i], values[i + 1], values[i + 2]) for i in range(0, len(values) - 2, 3)]
    return [] if all(red == green == blue for red, green, blue in colours) else colours
