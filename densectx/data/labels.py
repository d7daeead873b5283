"""Label files as they are stored: class ids, colours, fields of numbers, and the MATLAB files of two data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from densectx.data.arrays import kind_of, read_stored, refuse_lossy
from densectx.data.blob import Source
from densectx.data.limits import check_size
from densectx.data.matlab import read_variable
from densectx.data.pillow import ORIENTATION, STRETCHED, check_samples, opened, storage, unknown_mode
from densectx.errors import DataError

_MASK_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I;16N")
_INTEGER_TIFF = re.compile(r"int\d+ x |uint(32|64) x ")  # kinds that Pillow has no mode of ids for
_COMPRESSION, _PHOTOMETRIC, _MIN_IS_WHITE = 259, 262, 0  # TIFF 6.0
_TURNED = range(2, 9)  # EXIF orientations; 1 is upright, other values mean nothing


def read_mask(path: Source) -> Tensor:
    """A file of class ids: indices of a palette file (never its colours), values of a gray or two-level file.

    Args:
        path: a PNG, TIFF, BMP or PGM file of mode P, L, 1 or I;16; a TIFF or ``.npy`` file of whole numbers.

    Returns:
        (H, W) int64.

    Raises:
        DataError: missing, damaged, truncated, empty, too large, turned by EXIF, a TIFF whose 0 is white, lossy, or of
            another mode or type.
    """
    kind = kind_of(path)
    if kind == "npy" or _INTEGER_TIFF.match(kind):
        values = _values(path)
        if values.dtype.kind == "f" or values.dtype == np.uint64:
            raise DataError(f"{path}: holds {values.dtype}; class ids are whole numbers of at most 63 bits.")
        return torch.from_numpy(values[0].astype(np.int64))
    with _lossless(path) as (image, raw, maximum):
        if image.mode not in _MASK_MODES or maximum != 255 or raw == "I;12":
            raise DataError(
                unknown_mode(path, image, raw, f"{', '.join(_MASK_MODES[:4])}: ids as palette indices or gray values")
            )
        image.load()
        return torch.from_numpy(np.asarray(image).astype(np.int64)) // STRETCHED.get(raw, 1)


def read_colours(path: Source) -> NDArray[np.uint8]:
    """A mask whose classes are colours: (H, W, 3) uint8, as stored; palette files give their colours.

    Raises:
        DataError: as :func:`read_mask`, or not every pixel is opaque, or not 8 bits a channel.
    """
    with _lossless(path) as (image, raw, maximum):
        if image.mode not in ("RGB", "RGBA", "P", "L", "1") or maximum != 255 or re.search(r";16[BLN]$", raw):
            raise DataError(unknown_mode(path, image, raw, "RGB of 8 bits: one colour a class"))
        image.load()
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise DataError(f"{path}: has transparent pixels, whose class is unclear; store the mask opaque.")
        return np.array(image.convert("RGB"))


def read_field(path: Source, channels: int = 1) -> Tensor:
    """A file of numbers a pixel, such as depth or normals, as stored: (channels, H, W) float64. NaN stays.

    Args:
        path: a gray PNG, TIFF, BMP or PGM file of 8 or 16 bits, a TIFF of floats or whole numbers, or an ``.npy`` file
            (H, W), (channels, H, W) or (H, W, channels).
        channels: numbers a pixel; other than 1 are read from TIFF and ``.npy`` files.

    Raises:
        DataError: as :func:`read_mask`, or another number of channels.
    """
    kind = kind_of(path)
    if channels == 1 and not kind.startswith("float") and kind != "npy" and not _INTEGER_TIFF.match(kind):
        return read_mask(path)[None].double()
    if kind == "other":
        raise DataError(f"{path}: {channels} channels are read from TIFF and .npy files only.")
    return torch.from_numpy(_values(path, channels).astype(np.float64))


def _values(path: Source, channels: int = 1) -> NDArray[Any]:
    """(channels, H, W), as stored."""
    stored = read_stored(path, (channels,), exact=True)
    if len(stored.values) != channels:
        raise DataError(f"{path}: has {len(stored.values)} channels, expected {channels}.")
    if stored.orientation in _TURNED or stored.inverted:
        raise DataError(f"{path}: is stored turned or inverted; store it upright, with 0 as black.")
    return stored.values


def _is_min_white(image: ImageFile.ImageFile) -> bool:
    """Whether an opened file is a TIFF in which 0 is white."""
    return isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _MIN_IS_WHITE


@contextmanager
def _lossless(path: Source) -> Iterator[tuple[ImageFile.ImageFile, str, int]]:
    """A file opened and what :func:`storage` says of it; refuses what cannot hold exact values, and what is turned."""
    with opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError(
                f"{path}: a JPEG file cannot hold class ids, its values are approximate; store masks as PNG."
            )
        if isinstance(image, TiffImageFile):
            refuse_lossy(path, image.tag_v2.get(_COMPRESSION, 1))
        check_samples(path, image)
        raw, maximum = storage(image)  # before the tags are read, which may load the file
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation in _TURNED:
            raise DataError(f"{path}: a mask with EXIF orientation {orientation}; store it upright, without the tag.")
        if _is_min_white(image):  # Pillow gives stored numbers at 16 bits and their inverse below
            raise DataError(
                f"{path}: stored as MinIsWhite, so its grays run against its numbers and either may be the ids; if the"
                " numbers are, convert it: tifffile.imwrite('new.tif', tifffile.imread('old.tif'),"
                " photometric='minisblack')."
            )
        yield image, raw, maximum


def read_two_levels(path: Source) -> Tensor:
    """A mask of one class: (H, W) bool, false where the file has 0, true where it has its one other value.

    Raises:
        DataError: as :func:`read_mask`, or the file has more than one value beside 0.
    """
    mask = read_mask(path)
    values = torch.from_numpy(np.unique(mask.numpy()))
    other = values[values != 0]
    if len(other) > 1:
        shown = ", ".join(map(str, other[:8].tolist())) + (", ..." if len(other) > 8 else "")
        raise DataError(f"{path}: has the values {shown} beside 0; a mask of one class has 0 and one other value.")
    return mask != 0


def read_boundaries(path: Source) -> Tensor:
    """A BSDS500 ground-truth file: (1, H, W) float32, the mean of the annotators' boundary maps.

    Raises:
        DataError: not a MATLAB file of version 5, too large, or without ``groundTruth{k}.Boundaries`` of one size.
    """
    with _ground_truth(path, "BSDS500"):
        maps = [cell.field("Boundaries").numbers() for cell in read_variable(path, "groundTruth").cells()]
        height, width = maps[0].shape
        check_size(path, height, width, len(maps))
        mean = np.mean(np.stack([values.astype(np.float32) for values in maps]), axis=0, dtype=np.float32)
    if mean.min() < 0 or mean.max() > 1:
        raise DataError(f"{path}: expected boundary maps of 0 and 1, got {mean.min():g} to {mean.max():g}.")
    return torch.from_numpy(mean)[None]


def read_sbd(path: Source) -> Tensor:
    """A class file of the Semantic Boundaries Dataset (Hariharan et al. 2011): (H, W) int64 ids of PASCAL VOC.

    Raises:
        DataError: not a MATLAB file of version 5, too large, or without ``GTcls.Segmentation``.
    """
    with _ground_truth(path, "SBD"):
        ids = read_variable(path, "GTcls").field("Segmentation").numbers()
        if ids.ndim != 2 or ids.dtype.kind not in "ui":
            raise TypeError(f"{ids.dtype} of shape {ids.shape}")
        check_size(path, *ids.shape)
    return torch.from_numpy(ids.astype(np.int64))


@contextmanager
def _ground_truth(path: Source, of: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise DataError(f"{path}: no {of} ground truth ({type(error).__name__}: {error}).") from error
