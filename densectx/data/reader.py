"""Image, mask and number files to tensors: one table of modes, everything else refused.

Formats are those of :data:`densectx.data.pillow.FORMATS`, read by Pillow, and what :mod:`densectx.data.arrays`
reads: TIFF of floats, of 16-bit colour and of N channels, and ``.npy`` (others are never handed to a decoder).
Embedded ICC profiles are ignored: values are taken as sRGB. Of a file with several frames nothing is read, unless
they are the N channels that are asked for; only a camera's MPO (a JPEG with previews behind it) gives its first one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tifffile import TiffFile
from torch import Tensor

from densectx.data.arrays import Stored, kind_of, mapped, read_stored
from densectx.data.blob import Source, StrPath, stream
from densectx.data.pillow import picture
from densectx.errors import ConfigError, DataError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
"""What data sets take for an image file, by its lower-case extension."""

ARRAY_EXTENSIONS = frozenset({".tif", ".tiff", ".npy"})
"""The same for images of other than 1 or 3 channels. Files of 1 or 3 channels may be ``.npy`` where they are named."""

_TIFF_ARRAY = re.compile(r"float\d+ x |uint16 x (?!1$)")  # kinds that Pillow refuses or would reduce to 8 bits
_TIFF_DEEP = "uint16 x 1"
_MIN_IS_WHITE = 0  # TIFF 6.0, PhotometricInterpretation
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


def read_image(path: Source, channels: int = 3, value_range: Sequence[float] | None = None) -> tuple[Tensor, bool]:
    """An image file as sRGB in [0, 1], or as N channels in [0, 1], at the file's own depth.

    Gray files are replicated to 3 channels; colour files asked for as 1 channel give full-range BT.601 luma.
    Transparency is composited over white. EXIF orientation is applied. 16-bit gray and colour (PNG, TIFF, ``.npy``)
    keep their depth: 65535 is 1.0. Floating-point files (TIFF, ``.npy``) must lie in [0, 1]; nothing is clipped. A TIFF
    stored as MinIsWhite is read as it looks: its lowest value is 1.0.

    Args:
        path: a file of one of :data:`densectx.data.pillow.FORMATS`, or ``.npy``.
        channels: 1 or 3, or N: the file is then a TIFF of N samples or N pages, or an ``.npy`` file (N, H, W) or
            (H, W, N), and its channels are taken as they are.
        value_range: ``[lo, hi]``, what becomes 0 and 1 in TIFF, ``.npy`` and 16-bit PNG files, instead of the rule of
            their type, such as ``[0, 4095]`` of 12 bits stored in 16.

    Returns:
        The image, (channels, H, W) float32 in [0, 1], and whether the file has one channel (alpha not counted).

    Raises:
        DataError: missing, damaged, truncated, empty, too large, of a mode that is not in the table, of another
            number of channels, or with values that are not finite or out of range.
        ConfigError: channels or value_range is no such thing.
    """
    check_channels(channels)
    limits = range_of(value_range)
    kind = kind_of(path)
    order = _order_where_0_is_white(path) if kind == _TIFF_DEEP else ""
    plain = kind == "npy" or channels not in (1, 3) or (limits and kind != "other")
    if plain or _TIFF_ARRAY.match(kind) or order == ">":
        if kind == "other":
            raise DataError(f"{path}: {channels} channels are read from TIFF and .npy files only.")
        pixels, orientation = _plain(
            path, read_stored(path, (1, 3) if channels in (1, 3) else (channels,)), channels, limits
        )
    elif limits:
        pixels, orientation = _ranged_png(path, limits)
    else:
        pixels, orientation = picture(path)
        if order:
            pixels = 1 - pixels
    pixels = _upright(pixels, orientation)
    gray = pixels.shape[0] == 1
    if gray and channels == 3:
        pixels = pixels.expand(3, -1, -1)
    if channels == 1 and not gray:
        pixels = (pixels * torch.tensor(_LUMA)[:, None, None]).sum(0, keepdim=True).clamp_(max=1)
    return pixels.contiguous(), gray


def check_channels(value: int) -> int:
    """``channels`` of a config, checked.

    Raises:
        ConfigError: no whole number of at least 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"channels: expected 1 or 3, or the number of channels of the files, got {value!r}.")
    return value


def extensions_of(channels: int) -> frozenset[str]:
    """Of the files that data sets and ``predict`` take for images of so many channels."""
    return EXTENSIONS if channels in (1, 3) else ARRAY_EXTENSIONS


def is_real(path: StrPath) -> bool:
    """Whether a file holds floating-point numbers.

    Raises:
        DataError: it cannot be opened.
    """
    kind = kind_of(path)
    try:
        return kind.startswith("float") or (kind == "npy" and mapped(path).dtype.kind == "f")
    except Exception:  # NumPy parses the header as Python and raises many kinds; told by whoever reads it
        return False


def is_deep(path: Source) -> bool:
    """Whether a file that :func:`read_image` takes has more than 8 bits a channel.

    Raises:
        DataError: it cannot be opened.
    """
    kind = kind_of(path)
    if kind == "npy":
        try:
            return mapped(path).dtype.itemsize > 1
        except Exception as error:  # as in is_real: of many kinds
            raise DataError(f"{path}: not a readable array: {error}.") from error
    if kind != "other":
        return not kind.startswith(("uint8", "int8", "bool"))
    with stream(path) as file:
        head = file.read(25)
    return head.startswith(b"\x89PNG") and head[24] == 16  # ISO/IEC 15948: the bit depth in IHDR


def range_of(value: Sequence[float] | None) -> tuple[float, float] | None:
    """``value_range`` of a config, checked.

    Raises:
        ConfigError: not two finite numbers in rising order.
    """
    if value is None:
        return None
    numbers = [v for v in value if isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v)]
    if len(value) != 2 or len(numbers) != 2 or numbers[0] >= numbers[1]:
        raise ConfigError(f"value_range: expected [lo, hi] with lo < hi, got {list(value)!r}.")
    return float(numbers[0]), float(numbers[1])


def _order_where_0_is_white(path: Source) -> str:
    """``"<"`` or ``">"``, the byte order of a 16-bit gray TIFF in which 0 is white; empty where 0 is black.

    Pillow inverts files of at most 8 bits only: of these it gives ``"<"`` as stored and does not read ``">"``.
    """
    with stream(path) as file, TiffFile(file) as tiff:
        page = tiff.pages.first
        return tiff.byteorder if getattr(page, "photometric", None) == _MIN_IS_WHITE else ""


def _plain(path: Source, stored: Stored, channels: int, limits: tuple[float, float] | None) -> tuple[Tensor, int]:
    """What :func:`densectx.data.pillow.picture` returns, of an array file."""
    pixels = torch.from_numpy(_unit(path, stored, limits))
    samples = len(pixels)
    if channels in (1, 3) and samples in (2, 4) and stored.alpha:
        alpha = pixels[-1:]
        pixels = pixels[:-1] * (alpha if stored.alpha == "unassociated" else 1)
        if not stored.inverted:  # over white, which is 0 where 0 is white
            pixels = pixels + (1 - alpha)
        pixels = pixels.clamp_(max=1)  # associated colours may exceed their alpha by a rounding
    if stored.inverted:
        pixels = 1 - pixels
    if len(pixels) != channels and not (channels in (1, 3) and len(pixels) in (1, 3)):
        raise DataError(f"{path}: has {samples} channels, expected {channels}; set 'channels' to what the files have.")
    return pixels, stored.orientation


def _ranged_png(path: Source, limits: tuple[float, float]) -> tuple[Tensor, int]:
    """A 16-bit PNG by a range of its own. What is transparent is white, which a range of fewer bits does not hold."""
    if not is_deep(path):
        raise DataError(f"{path}: 'value_range' is for TIFF, .npy and 16-bit PNG files; others have their own white.")
    pixels, orientation = picture(path)
    numbers = (pixels.double() * 65535).round().numpy()  # as stored: float32 holds 16 bits
    return torch.from_numpy(_unit(path, Stored(numbers, None), limits)), orientation


def _unit(path: Source, stored: Stored, limits: tuple[float, float] | None) -> NDArray[np.float32]:
    """Stored numbers to [0, 1]."""
    values = stored.values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise DataError(f"{path}: {bad} of {values.size} values are NaN or infinite; an image has finite values.")
    if limits is None and stored.white in (255, 65535):
        return values.astype(np.float32) / np.float32(stored.white)
    if limits is None and values.dtype.kind != "f":
        raise DataError(f"{path}: holds {values.dtype}, which has no white of its own; set value_range: [lo, hi].")
    low, high = limits or (0.0, 1.0)
    found = float(values.min()), float(values.max())
    if found[0] < low or found[1] > high:
        raise DataError(
            f"{path}: values from {found[0]:g} to {found[1]:g} leave the range {low:g} to {high:g}; set"
            f" value_range: [lo, hi] to the range of all files (nothing is clipped)."
        )
    if limits is None:
        return values.astype(np.float32)
    return ((values.astype(np.float64) - low) / (high - low)).astype(np.float32)


_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {  # EXIF 2.32, table 6: (transpose first, axes to flip then)
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    transpose, axes = _TURNS.get(orientation, (False, ()))  # 1 is upright; other values mean nothing
    return torch.flip(pixels.mT if transpose else pixels, axes)
