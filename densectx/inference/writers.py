"""Answers as files: pictures of classes, restored images at the input's depth, raw numbers."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from densectx.errors import DataError, NumericError
from densectx.inference.overlay import overlay
from densectx.nn.colour import grey
from densectx.tasks.base import Task
from densectx.tasks.segmentation import default_palette
from densectx.types import SourceInfo


class Answer(NamedTuple):
    """What a file is made of.

    Attributes:
        image: (1 | 3, H, W) float32 sRGB 0..1, the input.
        deep: whether the input's file has 16 bits a channel.
        value: (K, H * scale, W * scale) float32, what ``DenseModel.predict`` returned.
    """

    image: Tensor
    deep: bool
    value: Tensor


Encoder: TypeAlias = Callable[[Answer], bytes]


def encoders(task: Task, info: SourceInfo, shape: Sequence[int], *, raw: bool) -> dict[str, Encoder]:
    """The files that are written for each answer of a task: {what follows the stem: content}.

    Args:
        task: the task.
        info: its source: class names and palette.
        shape: of an answer to a gray image.
        raw: whether the numbers are written too.
    """
    found: dict[str, Encoder] = {}
    if task.output == "classes" and len(info.classes) <= 256:  # a palette has no more
        palette = info.palette or default_palette(len(info.classes))
        found[".png"] = partial(classes_png, palette=palette)
        found[".overlay.png"] = partial(overlay_png, names=info.classes, palette=palette)
    elif task.output != "classes" and len(shape) == 3 and shape[0] in (1, 3):
        found[".png"] = partial(image_png, keep_gray=task.output == "restored")
    if raw:
        found[".npy"] = raw_npy
    return found


def classes_png(answer: Answer, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """The most probable class of every pixel as an index into the palette.

    Raises:
        DataError: the answer has not one channel a class: a colour image given to a model of gray ones.
        NumericError: the answer is not finite.
    """
    ids = _ids(answer.value, len(palette))
    image = Image.fromarray(ids)
    image.putpalette([value for colour in palette for value in colour])
    return _png(image)


def overlay_png(answer: Answer, names: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """The input under the colours of its classes, with a legend; raises as :func:`classes_png`."""
    photograph = _levels(answer.image.expand(3, -1, -1), 255).astype(np.uint8)
    return _png(overlay(photograph, _ids(answer.value, len(palette)), names, palette))


def image_png(answer: Answer, *, keep_gray: bool) -> bytes:
    """A picture, clamped and rounded to the depth of the input; gray for gray if ``keep_gray``.

    Raises:
        DataError: the answer has not 1 or 3 channels.
        NumericError: the answer is not finite.
    """
    value = answer.value
    if value.shape[0] not in (1, 3):
        raise DataError(f"an answer of {value.shape[0]} channels is no image.")
    _check_finite(value)
    if keep_gray and answer.image.shape[0] == 1:
        value = grey(value[None])[0]
    if answer.deep:
        return png16(_levels(value, 65535))
    return _png(Image.fromarray(_levels(value, 255).astype(np.uint8)))


def raw_npy(answer: Answer) -> bytes:
    """Exactly what the model returned: (K, H * scale, W * scale) float32."""
    file = io.BytesIO()
    np.save(file, answer.value.contiguous().numpy(), allow_pickle=False)
    return file.getvalue()


def png16(values: NDArray[np.uint16]) -> bytes:
    """A PNG file of 16 bits a channel, which Pillow cannot write in colour.

    Args:
        values: (H, W) or (H, W, 3).

    Source: ISO/IEC 15948 (PNG), filter type 2 (up).
    """
    height, width = values.shape[:2]
    rows = np.ascontiguousarray(values, ">u2").view(np.uint8).reshape(height, -1)
    filtered = np.full((height, rows.shape[1] + 1), 2, np.uint8)
    filtered[:1, 1:] = rows[:1]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _levels(value: Tensor, white: int) -> NDArray[np.uint16]:
    """(1 | 3, H, W) in 0..1 -> (H, W) or (H, W, 3) in 0..white."""
    levels = (value.clamp(0, 1) * white).round().permute(1, 2, 0).numpy().astype(np.uint16)
    return levels[..., 0] if levels.shape[2] == 1 else levels


def _ids(value: Tensor, classes: int) -> NDArray[np.uint8]:
    if value.ndim != 3 or value.shape[0] != classes:
        raise DataError(
            f"an answer of shape {tuple(value.shape)} for {classes} classes; a model of gray images takes gray files."
        )
    _check_finite(value)
    ids: NDArray[np.uint8] = value.argmax(0).to(torch.uint8).numpy()
    return ids


def _check_finite(value: Tensor) -> None:
    if not value.isfinite().all():
        raise NumericError("the model's answer is not finite (NaN or infinity).")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
