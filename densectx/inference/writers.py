"""Answers as files: pictures of classes, restored images at the input's depth, numbers."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from densectx.errors import ConfigError, DataError, NumericError
from densectx.inference.overlay import overlay, overlay_labels
from densectx.inference.rasters import png16, tif32
from densectx.nn.colour import as_rgb, grey
from densectx.palette import voc_palette
from densectx.tasks.base import Task
from densectx.types import SourceInfo


class Answer(NamedTuple):
    """What a file is made of.

    Attributes:
        image: (C, H, W) float32 sRGB 0..1, the input; C = 1 for a gray one.
        deep: whether the input's file has 16 bits a channel.
        value: (K, H * scale, W * scale) float32, what ``DenseModel.predict`` returned; of classes also
            (1, H * scale, W * scale) uint8, the most probable ones.
    """

    image: Tensor
    deep: bool
    value: Tensor


Encoder: TypeAlias = Callable[[Answer], bytes]


def encoders(
    task: Task, info: SourceInfo, shape: Sequence[int], *, raw: bool, real: bool = False
) -> dict[str, Encoder]:
    """The files that are written for each answer of a task: {what follows the stem: content}.

    Classes are a palette PNG and an overlay, labels a PNG each and an overlay, pictures PNG (those made from a file of
    floats: TIFF of floats), other numbers TIFF of floats.

    Args:
        task: the task.
        info: its source: class names and palette.
        shape: of an answer to a gray image.
        raw: whether the numbers are written too.
        real: whether the input's file holds floating-point numbers.

    Raises:
        ConfigError: names of classes that give the same file name; a palette of another number of classes.
    """
    found: dict[str, Encoder] = {}
    count = len(info.classes)
    first = int(task.output == "labels")  # colour 0 is black, for a background that labels do not have
    palette = info.palette or voc_palette(first + count)[first:]
    if task.output in ("classes", "labels") and len(palette) != count:
        raise ConfigError(
            f"the model's source {task.source!r} has {len(palette)} colours for {count} classes; one each is expected:"
            " save the model again from a config whose palette fits its classes."
        )
    if task.output == "classes" and count <= 256:  # a palette has no more
        found[".png"] = partial(classes_png, palette=palette)
        found[".overlay.png"] = partial(overlay_png, names=info.classes, palette=palette)
    elif task.output == "labels":
        for number, suffix in enumerate(label_suffixes(info.classes)):
            found[suffix] = partial(label_png, label=number, classes=count)
        found[".overlay.png"] = partial(labels_overlay_png, names=info.classes, palette=palette)
    elif task.output in ("restored", "image") and shape[0] in (1, 3):
        encode = image_tif if real else image_png
        found[".tif" if real else ".png"] = partial(encode, keep_gray=task.output == "restored")
    elif task.output != "classes":
        found[".tif"] = values_tif
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
    return _png(overlay(_photograph(answer), _ids(answer.value, len(palette)), names, palette))


def label_suffixes(names: Sequence[str]) -> list[str]:
    """What follows the stem in the file of each class: ``.NAME.png``, with what is no letter or digit as ``_``.

    Raises:
        ConfigError: two names, or a name and ``overlay``, would give the same file (also where case is ignored).
    """
    found, seen = [], {"overlay": "the overlay"}
    for name in names:
        safe = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", name))
        if safe.casefold() in seen:
            raise ConfigError(
                f"class {name!r} and {seen[safe.casefold()]} would be written to the same file .{safe}.png; rename one"
                " class."
            )
        seen[safe.casefold()] = f"class {name!r}"
        found.append(f".{safe}.png")
    return found


def label_png(answer: Answer, label: int, classes: int) -> bytes:
    """White where a class is at least as probable as not, else black; 8-bit gray. Raises as :func:`classes_png`."""
    return _png(Image.fromarray(_holds(answer.value, classes)[label].astype(np.uint8) * 255))


def labels_overlay_png(answer: Answer, names: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """The input under the colours of the classes that hold, with a legend; raises as :func:`classes_png`."""
    return _png(overlay_labels(_photograph(answer), _holds(answer.value, len(palette)), names, palette))


def values_tif(answer: Answer) -> bytes:
    """Numbers as they are: float32 TIFF, (H, W) for one channel, else (K, H, W) in planes, uncompressed.

    Raises:
        NumericError: the answer is not finite.
    """
    _check_finite(answer.value)
    return tif32(answer.value.contiguous().numpy(), "minisblack")


def image_tif(answer: Answer, *, keep_gray: bool) -> bytes:
    """A picture as it is, neither clamped nor rounded: float32 TIFF, sRGB with 0..1 black to white.

    Gray for gray if ``keep_gray``; raises as :func:`image_png`.
    """
    value = _picture(answer, keep_gray)
    return tif32(value.contiguous().numpy(), "minisblack" if len(value) == 1 else "rgb")


def image_png(answer: Answer, *, keep_gray: bool) -> bytes:
    """A picture, clamped and rounded to the depth of the input; gray for gray if ``keep_gray``.

    Raises:
        DataError: the answer has not 1 or 3 channels.
        NumericError: the answer is not finite.
    """
    value = _picture(answer, keep_gray)
    if answer.deep:
        return png16(_levels(value, 65535))
    return _png(Image.fromarray(_levels(value, 255).astype(np.uint8)))


def raw_npy(answer: Answer) -> bytes:
    """Exactly what the model returned: (K, H * scale, W * scale) float32."""
    file = io.BytesIO()
    np.save(file, answer.value.contiguous().numpy(), allow_pickle=False)
    return file.getvalue()


def _picture(answer: Answer, keep_gray: bool) -> Tensor:
    """(1 | 3, H, W), finite."""
    value = answer.value
    if value.shape[0] not in (1, 3):
        raise DataError(f"an answer of {value.shape[0]} channels is no image.")
    _check_finite(value)
    return grey(value[None])[0] if keep_gray and answer.image.shape[0] == 1 else value


def _photograph(answer: Answer) -> NDArray[np.uint8]:
    """What classes are laid over, (H, W, 3)."""
    return _levels(as_rgb(answer.image[None])[0], 255).astype(np.uint8)


def _levels(value: Tensor, white: int) -> NDArray[np.uint16]:
    """(1 | 3, H, W) in 0..1 -> (H, W) or (H, W, 3) in 0..white."""
    levels = (value.clamp(0, 1) * white).round().permute(1, 2, 0).numpy().astype(np.uint16)
    return levels[..., 0] if levels.shape[2] == 1 else levels


def _ids(value: Tensor, classes: int) -> NDArray[np.uint8]:
    if value.dtype == torch.uint8:
        whole: NDArray[np.uint8] = value[0].numpy()
        return whole
    _check_classes(value, classes)
    ids: NDArray[np.uint8] = value.argmax(0).to(torch.uint8).numpy()
    return ids


def _holds(value: Tensor, classes: int) -> NDArray[np.bool_]:
    _check_classes(value, classes)
    holds: NDArray[np.bool_] = (value >= 0.5).numpy()
    return holds


def _check_classes(value: Tensor, classes: int) -> None:
    if value.ndim != 3 or value.shape[0] != classes:
        raise DataError(
            f"an answer of shape {tuple(value.shape)} for {classes} classes; a model of gray images takes gray files."
        )
    _check_finite(value)


def _check_finite(value: Tensor) -> None:
    if not value.isfinite().all():
        raise NumericError("the model's answer is not finite (NaN or infinity).")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
