"""What the page draws of an answer, made of the answer's numbers."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from densectx.errors import DataError, NumericError
from densectx.inspection.colours import sequential
from densectx.nn.colour import grey
from densectx.palette import voc_palette
from densectx.types import SourceInfo

CELLS: Final = 256 << 20
"""Bytes of a map of classes or numbers that the page is given; larger ones are shown without hovering."""
_STEPS: Final = 32  # of a scale of colours


@final
@dataclass
class View:
    """What a page shows of an answer.

    Attributes:
        about: in JSON types.
        pixels: (H, W) or (H, W, 3), a picture to look at.
        cells: a number for every pixel (H, W), or (K, H, W), for the pointer.
    """

    about: dict[str, Any] = field(default_factory=dict)
    pixels: NDArray[np.uint8] | None = None
    cells: NDArray[Any] | None = None


def view(output: str, value: Tensor, info: SourceInfo, *, gray: bool) -> View:
    """What is shown of an answer.

    Args:
        output: of the task, see :class:`densectx.tasks.base.Task`.
        value: (K, H, W) float32.
        info: of the task's source.
        gray: whether the picture is gray.

    Raises:
        NumericError: the answer is not finite.
        DataError: not one channel a class.
    """
    if not value.isfinite().all():
        raise NumericError("The model's answer is not finite (NaN or infinity).")
    if output in ("classes", "labels"):
        if len(value) != len(info.classes):
            raise DataError(f"An answer of {len(value)} channels for {len(info.classes)} classes.")
        return _classes(value, info) if output == "classes" else _labels(value, info)
    if output in ("restored", "image") and len(value) in (1, 3):
        shown = grey(value[None])[0] if output == "restored" and gray else value
        return View({"kind": output}, levels(shown))
    return _numbers(value)


def levels(image: Tensor) -> NDArray[np.uint8]:
    """(C, H, W) sRGB 0..1 -> (H, W) or (H, W, 3) of 8 bits; of other than 3 channels the first one."""
    shown = image if len(image) == 3 else image[:1]
    found: NDArray[np.uint8] = (shown.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    return found[..., 0] if found.shape[2] == 1 else found


def _classes(value: Tensor, info: SourceInfo) -> View:
    count = len(info.classes)
    ids = value.argmax(0).numpy().astype(np.uint8 if count <= 256 else np.uint16)
    shares = np.bincount(ids.ravel(), minlength=count) / ids.size
    palette = info.palette or voc_palette(count)
    classes = [
        {"name": name, "colour": list(palette[i]), "share": float(shares[i])} for i, name in enumerate(info.classes)
    ]
    return View({"kind": "classes", "classes": classes, "bytes": ids.itemsize}, cells=ids)


def _labels(value: Tensor, info: SourceInfo) -> View:
    holds = (value >= 0.5).numpy()
    palette = info.palette or voc_palette(len(holds) + 1)[1:]
    classes = [
        {"name": name, "colour": list(palette[i]), "share": float(holds[i].mean())}
        for i, name in enumerate(info.classes)
    ]
    about = {"kind": "labels", "classes": classes, "bytes": 1}
    return View(about, cells=holds.astype(np.uint8) if holds.size <= CELLS else None)


def _numbers(value: Tensor) -> View:
    """The first channel in colours whose lightness is proportional to it, from its smallest to its largest number."""
    numbers = value[0].numpy()
    low, high = float(numbers.min()), float(numbers.max())
    unit = (numbers - low) / ((high - low) or 1.0)
    table = sequential(np.linspace(0, 1, 256))
    scale = [list(map(int, colour)) for colour in sequential(np.linspace(0, 1, _STEPS))]
    about = {"kind": "values", "low": low, "high": high, "scale": scale}
    cells = numbers if numbers.nbytes <= CELLS else None
    return View(about, table[(unit * 255).round().astype(np.uint8)], cells)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """As a file, made in little time rather than small."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
