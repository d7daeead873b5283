"""Files of plain numbers that Pillow cannot hold: TIFF of floats, of 16-bit colour, of N channels, and ``.npy``."""

from __future__ import annotations

import logging
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tifffile import COMPRESSION, TiffFile, TiffPage

from densectx.data.blob import Blob, Source, size_of, stream, suffix_of
from densectx.data.limits import check_size
from densectx.errors import DataError, brief

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it says of a file is in our one message

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # TIFF 6.0 and BigTIFF
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB = 0, 1, 2  # TIFF 6.0, PhotometricInterpretation
_ASSOCIATED, _UNASSOCIATED = 1, 2  # TIFF 6.0, ExtraSamples
_LZMA = 34925
_LOSSY = frozenset(  # some can be lossless too, which a header does not tell
    {
        *(COMPRESSION.OJPEG, COMPRESSION.JPEG, COMPRESSION.JPEG_99, COMPRESSION.ALT_JPEG, COMPRESSION.JPEG_LOSSY),
        *(COMPRESSION.JPEG2000, COMPRESSION.JPEG_2000_LOSSY),
        *(COMPRESSION.APERIO_JP2000_YCBC, COMPRESSION.APERIO_JP2000_RGB),
        *(COMPRESSION.JPEGXR, COMPRESSION.JPEGXR_NDPI, COMPRESSION.JPEGXL, COMPRESSION.JPEGXL_DNG),
        *(COMPRESSION.WEBP, COMPRESSION.WEBP_DEPRECATED),
    }
)
_REDUCED = 64  # pages beside those of the image that are looked through: smaller copies of it
_UNPACK: dict[int, Callable[[], Any]] = {  # TIFF's number of a compression -> one that stops where it is told to
    8: zlib.decompressobj,
    32946: zlib.decompressobj,
    _LZMA: lzma.LZMADecompressor,
}
_NPY_HEADERS: dict[tuple[int, int], Callable[[Any], Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_HARMLESS = 1 << 26  # bytes that may be unpacked without a look at how many there are


class Stored(NamedTuple):
    """What a file holds, as it is stored.

    Attributes:
        values: (C, H, W), the file's own type; alpha, if any, is the last channel.
        white: the largest value of an unsigned type, None for other types.
        alpha: ``""``, ``"associated"`` (colours are multiplied by it) or ``"unassociated"``.
        inverted: whether 0 is white.
        orientation: of EXIF, 1 is upright.
    """

    values: NDArray[Any]
    white: int | None
    alpha: str = ""
    inverted: bool = False
    orientation: int = 1


def kind_of(path: Source) -> str:
    """``"npy"``, ``"other"``, or the NumPy type and samples a pixel of a TIFF file's first page: ``"float32 x 3"``.

    A TIFF whose header cannot be read is ``"other"``.

    Raises:
        DataError: the file cannot be opened.
    """
    if suffix_of(path) == ".npy":
        return "npy"
    try:
        with stream(path) as file:
            if file.read(4) not in _TIFF:
                return "other"
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}.") from None
    try:
        with stream(path) as file, TiffFile(file) as tiff:
            page = _page(tiff.pages.first)
            return f"{page.dtype} x {page.samplesperpixel}"
    except Exception:  # told by whoever reads it
        return "other"


def refuse_lossy(path: Source, compression: int) -> None:
    """Refuse a TIFF as a label by its number of a compression.

    Raises:
        DataError: it keeps values approximately.
    """
    if compression in _LOSSY:
        raise DataError(
            f"{path}: a TIFF compressed as {COMPRESSION(compression).name}, whose values are approximate, cannot hold"
            " labels; store it uncompressed or with deflate."
        )


def read_stored(path: Source, channels: Collection[int] = (1,), *, exact: bool = False) -> Stored:
    """All numbers of a TIFF or ``.npy`` file.

    A TIFF has its channels as samples of one page (interleaved or planar), or as pages of one sample each; reduced
    copies (pyramids) are left out. An ``.npy`` file is (H, W), (C, H, W) or (H, W, C): of three axes the channels are
    the first, or else the last, of which there are as many as expected.

    Args:
        path: the file.
        channels: numbers of channels that are expected, alpha not counted; with several a TIFF must be a single page.
        exact: whether a TIFF of a lossy compression is refused.

    Raises:
        DataError: missing, damaged, truncated, too large, or of a layout that is not read.
    """
    with _opened(path):
        return _npy(path, channels) if suffix_of(path) == ".npy" else _tiff(path, channels, exact)


@contextmanager
def _opened(path: Source) -> Iterator[None]:
    try:
        yield
    except (DataError, MemoryError):
        raise
    except OSError as error:
        if error.strerror:
            raise DataError(f"{path}: cannot be opened: {error.strerror}.") from None
        raise DataError(f"{path}: damaged or truncated ({brief(error)}); replace the file.") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        if "imagecodecs" in str(error):
            raise DataError(
                f"{path}: its compression needs a package more ({brief(error)}): pip install imagecodecs,"
                " or store it uncompressed or with deflate."
            ) from None
        raise DataError(
            f"{path}: damaged or truncated ({type(error).__name__}: {brief(error)}); replace the file."
        ) from error


def _npy(path: Source, channels: Collection[int]) -> Stored:
    values = mapped(path)
    if values.dtype.kind not in "uif":
        raise DataError(f"{path}: holds {values.dtype}; expected whole or floating-point numbers.")
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3:
        raise DataError(f"{path}: has shape {values.shape}; expected (H, W), (C, H, W) or (H, W, C).")
    if values.shape[0] not in channels:
        if values.shape[2] not in channels:
            expected = " or ".join(map(str, channels))
            raise DataError(f"{path}: has shape {values.shape}; expected {expected} channels as first or last axis.")
        values = np.moveaxis(values, 2, 0)
    check_size(path, values.shape[1], values.shape[2], values.shape[0])
    native = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
    return Stored(native, np.iinfo(native.dtype).max if native.dtype.kind == "u" else None)


def mapped(path: Source) -> NDArray[Any]:
    """The numbers of an ``.npy`` file where they lie: nothing is read, nothing unpickled."""
    if not isinstance(path, Blob):
        stream(path).close()  # refuses what is no file
        return np.lib.format.open_memmap(Path(path), mode="r")
    with stream(path) as file:
        header = _NPY_HEADERS[np.lib.format.read_magic(file)]
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            raise ValueError("holds Python objects")
        return np.frombuffer(path.content, dtype, prod(shape), file.tell()).reshape(
            shape, order="F" if fortran else "C"
        )


def _tiff(path: Source, channels: Collection[int], exact: bool) -> Stored:
    with stream(path) as file, TiffFile(file) as tiff:
        first = _page(tiff.pages.first)
        _check_page(path, first, exact)
        pages = [first]
        for number, other in enumerate(map(_page, tiff.pages)):
            if number > max(channels) + _REDUCED:  # a damaged file may lead in circles for ever
                raise DataError(f"{path}: has more than {number} frames or pages; expected one image a file.")
            if number == 0 or other.is_reduced:
                continue
            if len(channels) > 1:
                raise DataError(f"{path}: has more than one frame or page; expected one image a file.")
            if other.shaped != first.shaped or other.dtype != first.dtype:
                raise DataError(
                    f"{path}: page {number + 1} is {_shape(other)} but page 1 is {_shape(first)}; pages that are"
                    " channels of one image must be alike."
                )
            _check_page(path, other, exact)
            pages.append(other)
        samples = first.shaped[0] * first.shaped[4]
        if len(pages) > 1 and samples > 1:
            raise DataError(f"{path}: has {len(pages)} pages of {samples} samples; expected one of both to be 1.")
        check_size(path, first.imagelength, first.imagewidth, samples * len(pages))
        values = np.concatenate([_values(page) for page in pages])
    dtype = values.dtype
    extra = tuple(map(int, first.extrasamples))
    names = {_ASSOCIATED: "associated", _UNASSOCIATED: "unassociated"}
    orientation = first.tags.get(274)
    return Stored(
        values.astype(dtype.newbyteorder("="), copy=False),
        (1 << first.bitspersample) - 1 if dtype.kind == "u" else None,
        names.get(extra[0], "") if len(extra) == 1 else "",
        first.photometric == _MIN_IS_WHITE,
        int(orientation.value) if orientation else 1,
    )


def _page(page: Any) -> TiffPage:
    if not isinstance(page, TiffPage):
        raise TypeError(f"a page of type {type(page).__name__}")
    return page


def _shape(page: TiffPage) -> str:
    return f"{page.imagelength}x{page.imagewidth} of {page.dtype} x {page.samplesperpixel}"


def _values(page: TiffPage) -> NDArray[Any]:
    """(samples, H, W)."""
    planes, _, height, width, samples = page.shaped
    stored = page.asarray(squeeze=False, maxworkers=1).reshape(planes, height, width, samples)
    return stored.transpose(0, 3, 1, 2).reshape(planes * samples, height, width)


def _check_page(path: Source, page: TiffPage, exact: bool) -> None:
    """Refuse a header that lies: tifffile fills what is missing with zeros."""
    if exact:
        refuse_lossy(path, page.compression)
    if not all(isinstance(size, int) for size in (*page.shaped, *page.chunked)):  # tags of any type are taken over
        raise DataError(f"{path}: damaged (a size that is no number); replace the file.")
    if page.dtype is None or page.dtype.kind not in "uif":
        raise DataError(f"{path}: holds {page.dtype}; expected whole or floating-point numbers.")
    if page.photometric not in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB) or page.imagedepth != 1:
        name = getattr(page.photometric, "name", page.photometric)
        raise DataError(f"{path}: a TIFF of {page.dtype} stored as {name}; expected gray, RGB or N plain channels.")
    check_size(path, page.imagelength, page.imagewidth, page.shaped[0] * page.shaped[4])
    size = size_of(path)
    offsets, counts = page.dataoffsets, page.databytecounts
    whole = len(offsets) == len(counts) >= prod(page.chunked)
    if not whole or any(c <= 0 or o <= 0 or o + c > size for o, c in zip(offsets, counts, strict=True)):
        raise DataError(f"{path}: damaged or truncated (parts of the image are missing); replace the file.")
    if sum(counts) > 2 * page.nbytes + 4096 * len(counts):
        raise DataError(f"{path}: stores {sum(counts)} bytes for {page.nbytes} bytes of pixels; replace the file.")
    _check_unpacked(path, page)


def _check_unpacked(path: Source, page: TiffPage) -> None:
    """Refuse compressed data that are more than their tile or strip: tifffile would unpack all of them first."""
    rows, *others = page.chunks
    if page.is_tiled:
        check_size(path, page.tilelength, page.tilewidth, page.samplesperpixel)
    elif rows > page.imagelength:
        rows = page.imagelength
    most = prod((rows, *others)) * (page.dtype.itemsize if page.dtype else 1)
    unpack = _UNPACK.get(int(page.compression))
    if unpack is None:
        return
    with stream(path) as file:
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            if page.compression != _LZMA and count * 1032 <= _HARMLESS:  # deflate's best
                continue
            file.seek(offset)
            if len(unpack().decompress(file.read(count), most + 1)) > most:
                raise DataError(f"{path}: {count} bytes of it unpack to more than the {most} of their part: a bomb.")
