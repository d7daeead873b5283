"""Sizes: how large a file may be before any of it is decoded, and whether two pictures fit together."""

from __future__ import annotations

from torch import Tensor

from densectx.data.blob import Source, size_of
from densectx.errors import DataError

MAX_PIXELS = 178_956_970
"""Pixels of the largest file that is decoded: twice Pillow's own limit, which is only a warning. Files of more than
three channels may have three times as many numbers."""

MAX_RATIO, RATIO_FROM = 10_000, 1 << 25
"""Pixels a byte of file from which a header of more than RATIO_FROM pixels is taken for a bomb (PNG ends at 8256)."""


def check_size(path: Source, height: int, width: int, channels: int = 1) -> None:
    """Refuse what a header declares, before memory is taken for it.

    Raises:
        DataError: empty, too large, or far more pixels than the bytes of the file can hold.
    """
    pixels = width * height
    if pixels <= 0 or channels <= 0:
        raise DataError(f"{path}: the image is empty ({height}x{width} pixels, {channels} channels).")
    if pixels > MAX_PIXELS:
        raise DataError(
            f"{path}: {height}x{width} pixels, more than the limit of {MAX_PIXELS}: a decompression bomb,"
            " or an image to cut into tiles."
        )
    if pixels * channels > 3 * MAX_PIXELS:
        raise DataError(
            f"{path}: {channels} channels of {height}x{width} pixels, more than the limit of {3 * MAX_PIXELS} numbers;"
            " cut it into tiles."
        )
    size = size_of(path)
    if pixels > RATIO_FROM and pixels > MAX_RATIO * size:
        raise DataError(
            f"{path}: declares {height}x{width} pixels in {size} bytes: truncated, or a decompression bomb."
        )


def check_same_size(image_file: object, image: Tensor, label_file: object, label: Tensor, scale: int = 1) -> None:
    """Refuse a label that is not ``scale`` times as large as its image; both are (..., H, W).

    Raises:
        DataError: both files, sizes and, with a scale, the ratios are named.
    """
    (h, w), (label_h, label_w) = image.shape[-2:], label.shape[-2:]
    if (h * scale, w * scale) == (label_h, label_w):
        return
    if scale == 1:
        raise DataError(
            f"{image_file} is {h}x{w} but its label {label_file} is {label_h}x{label_w} (height x width);"
            " they must have the same size."
        )
    raise DataError(
        f"{image_file} is {h}x{w} and its target {label_file} is {label_h}x{label_w} (height x width): a ratio of"
        f" {label_h / h:.4g} x {label_w / w:.4g}, but 'scale' is {scale}, which expects {h * scale}x{w * scale}."
    )
