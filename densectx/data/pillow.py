"""What Pillow reads, by one table of modes; whatever a damaged file makes it raise becomes one error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from densectx.data.blob import Source, stream
from densectx.data.limits import MAX_PIXELS, check_size
from densectx.errors import DataError, brief

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
"""Pillow's names of the formats that are read."""

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
STRETCHED = {"L;2": 85, "L;4": 17}
"""Raw modes of gray files whose values Pillow multiplies, so that white is 255."""

_WITH_ALPHA = {"1": "LA", "L": "LA", "LA": "LA", "P": "RGBA", "RGB": "RGBA", "RGBA": "RGBA"}
ORIENTATION = 274  # EXIF tag
_SAMPLES, _PLANAR, _TILE_WIDTH, _TILE_LENGTH, _EXTRA = 277, 284, 322, 323, 338  # TIFF 6.0
_SEPARATE = 2  # TIFF 6.0, PlanarConfiguration
_ALPHA = ((1,), (2,))  # TIFF 6.0, ExtraSamples: associated, unassociated


def picture(path: Source) -> tuple[Tensor, int]:
    """(1 | 3, H, W) float32 in [0, 1] as stored, and the orientation that is still to be applied."""
    with opened(path) as image:
        raw, maximum = storage(image)
        if image.mode not in _MODES or maximum > 255 or raw == "I;12":
            raise DataError(unknown_mode(path, image, raw, ", ".join(_MODES)))
        deep = re.search(r";16[BLN]$", raw) is not None and not image.mode.startswith("I;16")
        if deep and image.format != "PNG":  # Pillow would drop the low byte without a word
            raise DataError(unknown_mode(path, image, raw, "16-bit colour as PNG only"))
        if "transparency" in image.info and (deep or image.mode not in _WITH_ALPHA):
            raise DataError(
                unknown_mode(path, image, raw, "no transparent colour in 16-bit files; use an alpha channel")
            )
        check_samples(path, image)
        image.load()
        orientation = image.getexif().get(ORIENTATION, 1)  # after load(): Pillow has turned a TIFF already
        pixels = _deep_png(path, raw) if deep else _pixels(image)
    if pixels.shape[0] in (2, 4):
        alpha = pixels[-1:]
        pixels = pixels[:-1] * alpha + (1 - alpha)
    return pixels, orientation


@contextmanager
def opened(path: Source) -> Iterator[ImageFile.ImageFile]:
    """Open a file, check its header, and turn whatever Pillow raises inside the block into one DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            with stream(path) as file, Image.open(file, formats=FORMATS) as image:
                _check_header(path, image)
                _stretch_transparent(image)
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
        raise DataError(f"{path}: damaged or truncated ({brief(error)}); replace the file.") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); replace the file.") from error


def _check_header(path: Source, image: ImageFile.ImageFile) -> None:
    check_size(path, image.height, image.width)
    if image.format == "TIFF":
        _check_parts(path, image)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise DataError(f"{path}: has {frames} frames or pages; expected one image a file.")


def _check_parts(path: Source, image: ImageFile.ImageFile) -> None:
    """Refuse a TIFF of huge tiles, of which one is decoded whole, or without some: Pillow leaves what lacks black."""
    tags = getattr(image, "tag_v2", {})
    check_size(path, tags.get(_TILE_LENGTH, 1), tags.get(_TILE_WIDTH, 1))
    planes = tags.get(_SAMPLES, 1) if tags.get(_PLANAR, 1) == _SEPARATE else 1
    if image.tile and image.tile[0].codec_name != "libtiff":  # that tells by itself
        boxes = [tile.extents or (0, 0, 0, 0) for tile in image.tile]
        stored = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        if stored < planes * image.width * image.height:
            raise DataError(f"{path}: damaged or truncated (parts of the image are missing); replace the file.")


def check_samples(path: Source, image: ImageFile.ImageFile) -> None:
    """Refuse a TIFF with more than colours and alpha, such as near infrared.

    Pillow leaves a sample out that is declared as something else, and takes one for alpha that is not declared.

    Raises:
        DataError: it has one.
    """
    if not isinstance(image, TiffImageFile):
        return
    bands = image.getbands()
    samples, extra = image.tag_v2.get(_SAMPLES, len(bands)), image.tag_v2.get(_EXTRA, ())
    if samples != len(bands) or (bands[-1] in ("A", "a") and extra not in _ALPHA):
        raise DataError(
            f"{path}: has {samples} channels, and what is beside its colours is not declared as alpha (ExtraSamples 1"
            f" or 2); store it without, or set 'channels' to {samples} to take all as they are."
        )


def _stretch_transparent(image: ImageFile.ImageFile) -> None:
    """Give the transparent value of a gray PNG in the numbers that Pillow makes of its pixels: it forgets that."""
    value = image.info.get("transparency")
    if image.mode == "1" and value:
        image.info["transparency"] = 255  # which Pillow 13 says itself
    elif image.mode == "L" and value:
        image.info["transparency"] = value * STRETCHED.get(storage(image)[0], 1)


def storage(image: ImageFile.ImageFile) -> tuple[str, int]:
    """How the file stores pixels: Pillow's raw mode (``"RGB;16B"``) and, for PPM files, the maximum value."""
    if not image.tile:
        return image.mode, 255
    args = image.tile[0].args
    values = args if isinstance(args, tuple) else (args,)
    raw = next((value for value in values if isinstance(value, str)), image.mode)
    return raw, int(values[1]) if image.tile[0].codec_name in ("ppm", "ppm_plain") and len(values) > 1 else 255


def unknown_mode(path: Source, image: ImageFile.ImageFile, raw: str, expected: str) -> str:
    """The message for a file of a mode that is not in the table."""
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


def _deep_png(path: Source, raw: str) -> Tensor:
    """A 16-bit colour PNG, of which Pillow by itself keeps the high bytes only: (2..4, H, W) float32 in [0, 1].

    Reading the same bytes as little-endian gives the low ones; gray with alpha has the size of RGBA's four bytes.
    """
    if raw == "LA;16B":
        pixels = _stored_as(path, "RGBA").astype(np.int32)
        values = pixels[..., ::2] * 256 + pixels[..., 1::2]
    else:
        values = _stored_as(path, raw).astype(np.int32) * 256 + _stored_as(path, raw.replace(";16B", ";16L"))
    return torch.from_numpy(values).permute(2, 0, 1).to(torch.float32).div_(65535)


def _stored_as(path: Source, raw: str) -> NDArray[np.uint8]:
    with stream(path) as file, Image.open(file, formats=("PNG",)) as image:
        image.tile = [tile._replace(args=raw) for tile in image.tile]
        return np.array(image)
