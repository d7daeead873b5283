"""Image and mask files to tensors: one table of modes, everything else refused.

Formats are those of :data:`FORMATS` (others are never handed to a decoder). Embedded ICC profiles are ignored:
values are taken as sRGB. Of a file with several frames nothing is read; only a camera's MPO (a JPEG with
previews behind it) gives its first picture.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from densectx.errors import ConfigError, DataError

StrPath: TypeAlias = str | PathLike[str]

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
"""What data sets take for an image file, by its lower-case extension."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
"""Pillow's names of the formats that are read."""

MAX_PIXELS = 178_956_970
"""Pixels of the largest file that is decoded: twice Pillow's own limit, which is only a warning."""

MAX_RATIO, RATIO_FROM = 10_000, 1 << 25
"""Pixels a byte of file from which a header of more than RATIO_FROM pixels is taken for a bomb (PNG ends at 8256)."""

_MODES: dict[str, tuple[str, int]] = {  # Pillow mode -> (mode it is converted to, value of white)
    "1": ("L", 255),
    "L": ("L", 255),
    "LA": ("LA", 255),
    "P": ("RGB", 255),
    "RGB": ("RGB", 255),
    "RGBA": ("RGBA", 255),
    "CMYK": ("RGB", 255),
    "YCbCr": ("RGB", 255),
    "I;16": ("I;16", 65535),
    "I;16B": ("I;16B", 65535),
    "I;16L": ("I;16L", 65535),
    "I;16N": ("I;16N", 65535),
}
_WITH_ALPHA = {"1": "LA", "L": "LA", "LA": "LA", "P": "RGBA", "RGB": "RGBA", "RGBA": "RGBA"}
_MASK_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I;16N")
_MASK_STEP = {"L;2": 85, "L;4": 17}  # Pillow stretches gray files of 2 and 4 bits to 0..255
_ORIENTATION = 274  # EXIF tag
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


def read_image(path: StrPath, channels: int = 3) -> tuple[Tensor, bool]:
    """An image file as sRGB in [0, 1], at the file's own depth.

    Gray files are replicated to 3 channels; colour files asked for as 1 channel give full-range BT.601 luma.
    Transparency is composited over white. EXIF orientation is applied. 16-bit gray (PNG, TIFF) and 16-bit colour
    PNG keep their depth: 65535 is 1.0.

    Args:
        path: a file of one of :data:`FORMATS`.
        channels: 1 or 3.

    Returns:
        The image, (channels, H, W) float32 in [0, 1], and whether the file has one channel (alpha not counted).

    Raises:
        DataError: missing, damaged, truncated, empty, too large, or of a mode that is not in the table.
        ConfigError: channels is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ConfigError(f"channels: expected 1 or 3, got {channels!r}.")
    with _opened(path) as image:
        raw, maximum = _storage(image)
        if image.mode not in _MODES or maximum > 255 or raw == "I;12":
            raise DataError(_unknown_mode(path, image, raw, ", ".join(_MODES)))
        deep = re.search(r";16[BLN]$", raw) is not None and not image.mode.startswith("I;16")
        if deep and image.format != "PNG":  # Pillow would drop the low byte without a word
            raise DataError(_unknown_mode(path, image, raw, "16-bit colour as PNG only"))
        if "transparency" in image.info and (deep or image.mode not in _WITH_ALPHA):
            raise DataError(
                _unknown_mode(path, image, raw, "no transparent colour in 16-bit files; use an alpha channel")
            )
        image.load()
        orientation = image.getexif().get(_ORIENTATION, 1)  # after load(): Pillow has turned a TIFF already
        pixels = _deep_png(path, raw) if deep else _pixels(image)
    if pixels.shape[0] in (2, 4):
        alpha = pixels[-1:]
        pixels = pixels[:-1] * alpha + (1 - alpha)
    pixels = _upright(pixels, orientation)
    gray = pixels.shape[0] == 1
    if gray and channels == 3:
        pixels = pixels.expand(3, -1, -1)
    if not gray and channels == 1:
        pixels = (pixels * torch.tensor(_LUMA)[:, None, None]).sum(0, keepdim=True).clamp_(max=1)
    return pixels.contiguous(), gray


def read_mask(path: StrPath) -> Tensor:
    """A file of class ids: indices of a palette file (never its colours), values of a gray or two-level file.

    Args:
        path: a PNG, TIFF, BMP or PGM file of mode P, L, 1 or I;16.

    Returns:
        (H, W) int64.

    Raises:
        DataError: missing, damaged, truncated, empty, too large, turned by EXIF, lossy, or of another mode.
    """
    with _opened(path) as image:
        raw, maximum = _storage(image)
        if image.format in ("JPEG", "MPO"):
            raise DataError(
                f"{path}: a JPEG file cannot hold class ids, its values are approximate; store masks as PNG."
            )
        if image.mode not in _MASK_MODES or maximum != 255 or raw == "I;12":
            raise DataError(
                _unknown_mode(path, image, raw, f"{', '.join(_MASK_MODES[:4])}: ids as palette indices or gray values")
            )
        orientation = image.getexif().get(_ORIENTATION, 1)
        if orientation in _TURNS:
            raise DataError(f"{path}: a mask with EXIF orientation {orientation}; store it upright, without the tag.")
        image.load()
        return torch.from_numpy(np.asarray(image).astype(np.int64)) // _MASK_STEP.get(raw, 1)


@contextmanager
def _opened(path: StrPath) -> Iterator[ImageFile.ImageFile]:
    """Open a file, check its header, and turn whatever Pillow raises inside the block into one DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            with Image.open(path, formats=FORMATS) as image:
                _check_header(path, image)
                yield image
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a readable image; expected {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error} The limit is {MAX_PIXELS} pixels; cut it into tiles.") from None
    except OSError as error:
        if error.strerror:  # of the file system: missing, a folder, no permission
            raise DataError(f"{path}: cannot be opened: {error.strerror}.") from None
        raise DataError(f"{path}: damaged or truncated ({error}); replace the file.") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); replace the file.") from error


def _check_header(path: StrPath, image: ImageFile.ImageFile) -> None:
    width, height = image.size
    pixels = width * height
    if pixels == 0:
        raise DataError(f"{path}: the image is empty ({height}x{width} pixels).")
    if pixels > MAX_PIXELS:
        raise DataError(
            f"{path}: {height}x{width} pixels, more than the limit of {MAX_PIXELS}: a decompression bomb,"
            " or an image to cut into tiles."
        )
    size = Path(path).stat().st_size
    if pixels > RATIO_FROM and pixels > MAX_RATIO * size:
        raise DataError(
            f"{path}: declares {height}x{width} pixels in {size} bytes: truncated, or a decompression bomb."
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise DataError(f"{path}: has {frames} frames or pages; expected one image a file.")


def _storage(image: ImageFile.ImageFile) -> tuple[str, int]:
    """How the file stores pixels: Pillow's raw mode (``"RGB;16B"``) and, for PPM files, the maximum value."""
    if not image.tile:
        return image.mode, 255
    args = image.tile[0].args
    values = args if isinstance(args, tuple) else (args,)
    raw = next((value for value in values if isinstance(value, str)), image.mode)
    return raw, int(values[1]) if image.tile[0].codec_name in ("ppm", "ppm_plain") and len(values) > 1 else 255


def _unknown_mode(path: StrPath, image: ImageFile.ImageFile, raw: str, expected: str) -> str:
    return f"{path}: mode {image.mode} (stored as {raw} in {image.format}) is not read here; expected {expected}."


def _pixels(image: ImageFile.ImageFile) -> Tensor:
    """(1..4, H, W) float32 in [0, 1]; an even number of channels ends with alpha."""
    target, white = _MODES[image.mode]
    if "transparency" in image.info or image.has_transparency_data:
        target = _WITH_ALPHA[image.mode]
    array = np.array(image if image.mode == target else image.convert(target))
    array = array.astype(np.float32) if white > 255 else array  # I;16B is big-endian, which torch does not take
    tensor = torch.from_numpy(array).reshape(image.height, image.width, -1)
    return tensor.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(white)


def _deep_png(path: StrPath, raw: str) -> Tensor:
    """A 16-bit colour PNG, of which Pillow by itself keeps the high bytes only: (2..4, H, W) float32 in [0, 1].

    Reading the same bytes as little-endian gives the low ones; gray with alpha has the size of RGBA's four bytes.
    """
    if raw == "LA;16B":
        pixels = _stored_as(path, "RGBA").astype(np.int32)
        values = pixels[..., ::2] * 256 + pixels[..., 1::2]
    else:
        values = _stored_as(path, raw).astype(np.int32) * 256 + _stored_as(path, raw.replace(";16B", ";16L"))
    return torch.from_numpy(values).permute(2, 0, 1).to(torch.float32).div_(65535)


def _stored_as(path: StrPath, raw: str) -> NDArray[np.uint8]:
    with Image.open(path, formats=("PNG",)) as image:
        image.tile = [tile._replace(args=raw) for tile in image.tile]
        return np.array(image)


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
