"""Pictures larger than memory: TIFF, BigTIFF and ``.npy`` files read window by window."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from tifffile import TiffFile, TiffPage
from torch import Tensor

from densectx.data.arrays import kind_of
from densectx.data.limits import MAX_PIXELS
from densectx.errors import DataError, brief

WINDOWED_FROM: Final = MAX_PIXELS
"""Pixels from which a file is read by windows: what the reader of whole pictures refuses."""

_KEPT: Final = 1 << 26  # bytes of decoded parts that are kept: a row of tiles is wanted by several windows
_PAGES: Final = 64  # that are looked through: the picture and smaller copies of it
_PART: Final = 1 << 28  # bytes of the largest part (tile or strip) that is decoded


@final
class WindowedFile:
    """A large picture on disk. Values are those of :func:`densectx.data.reader.read_image`.

    Args:
        path: an ``.npy`` file (H, W), (C, H, W) or (H, W, C), or a TIFF of one page, in tiles or strips.
        channels: 3 for gray or colour (a gray file stays gray), else N.
        value_range: what becomes 0 and 1, None for the rule of the type.

    Attributes:
        shape: (C, H, W).
        dtype: of the file.

    Raises:
        DataError: damaged, or of a layout that is not read by windows.
    """

    def __init__(self, path: Path, channels: int = 3, value_range: tuple[float, float] | None = None) -> None:
        self.path, self.range = path, value_range
        wanted = (1, 3) if channels in (1, 3) else (channels,)
        try:
            self._parts: _Parts = _NpyParts(path, wanted) if kind_of(path) == "npy" else _TiffParts(path)
        except DataError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise DataError(
                f"{path}: damaged or truncated ({type(error).__name__}: {brief(error)}); replace it."
            ) from error
        self.shape, self.dtype = self._parts.shape, self._parts.dtype
        if self.shape[0] not in wanted:
            raise DataError(f"{path}: has {self.shape[0]} channels, expected {' or '.join(map(str, wanted))}.")
        if value_range is None and self._parts.white not in (255, 65535) and self.dtype.kind != "f":
            held = f"{self.dtype} up to {self._parts.white}" if self._parts.white else self.dtype
            raise DataError(f"{path}: holds {held}, which has no white of its own; set value_range: [lo, hi].")

    @property
    def deep(self) -> bool:
        """Whether there are more than 8 bits a channel."""
        return self.dtype.itemsize > 1

    @property
    def real(self) -> bool:
        """Whether answers are restored to floats: the file holds some, or has a range of its own."""
        return self.dtype.kind == "f" or self.range is not None

    def read(self, rows: slice, columns: slice) -> Tensor:
        """(C, h, w) float32 in [0, 1].

        Raises:
            DataError: damaged, or values out of range.
        """
        try:
            stored = self._parts.read(rows, columns)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.path}: damaged or truncated ({type(error).__name__}: {brief(error)}).") from error
        if self.range is None and self._parts.white is not None:
            return self._as_seen(stored.astype(np.float32) / np.float32(self._parts.white))
        low, high = self.range or (0.0, 1.0)
        values = ((stored.astype(np.float64) - low) / (high - low)).astype(np.float32)
        if not (values.min() >= 0 and values.max() <= 1):  # false for NaN
            raise DataError(
                f"{self.path}: rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop}: values that"
                f" are not finite or leave the range {low:g} to {high:g}; set value_range (nothing is clipped)."
            )
        return self._as_seen(values)

    def _as_seen(self, values: NDArray[np.float32]) -> Tensor:
        """Stored values of 0 to 1 with 1 as white."""
        return torch.from_numpy(1 - values if self._parts.inverted else values)


def needs_windows(path: Path) -> bool:
    """Whether a file has more pixels than are read as a whole, and is of a kind that can be read by windows."""
    if not os.path.isfile(path):  # a pipe would block
        return False
    try:
        kind = kind_of(path)
        if kind == "other":
            return False
        if kind == "npy":
            shape = np.lib.format.open_memmap(path, mode="r").shape
            return len(shape) > 1 and prod(sorted(shape)[-2:]) > WINDOWED_FROM
        with TiffFile(path) as tiff:
            page = tiff.pages.first
            return int(page.imagelength) * int(page.imagewidth) > WINDOWED_FROM
    except Exception:  # told by whoever reads it
        return False


class _Parts(ABC):
    """What is read from: shape (C, H, W), type, largest unsigned number, whether 0 is white, windows as stored."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    white: int | None = None
    inverted = False

    @abstractmethod
    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """(C, h, w)."""


@final
class _NpyParts(_Parts):
    def __init__(self, path: Path, wanted: tuple[int, ...]) -> None:
        values = np.lib.format.open_memmap(path, mode="r")  # nothing is read, nothing unpickled
        if values.dtype.kind not in "uif" or values.ndim not in (2, 3):
            raise DataError(f"{path}: holds {values.dtype} of shape {values.shape}; expected numbers (C, H, W).")
        self._path, self._last = path, values.ndim == 3 and values.shape[0] not in wanted
        self._values = self._channels_first(values)
        channels, height, width = self._values.shape
        self.shape, self.dtype = (channels, height, width), values.dtype.newbyteorder("=")
        self.white = np.iinfo(self.dtype).max if self.dtype.kind == "u" else None

    def _channels_first(self, values: NDArray[Any]) -> NDArray[Any]:
        return values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0) if self._last else values

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """A copy; the mapping is made anew, so that pages which were read do not stay in memory."""
        part = np.array(self._values[:, rows, columns], dtype=self.dtype, order="C")
        self._values = self._channels_first(np.lib.format.open_memmap(self._path, mode="r"))
        return part


@final
class _TiffParts(_Parts):
    def __init__(self, path: Path) -> None:
        self._tiff = TiffFile(path)
        some = list(islice(self._tiff.pages, _PAGES + 1))  # a damaged file may lead in circles for ever
        if len(some) > _PAGES:
            raise DataError(f"{path}: has more than {_PAGES} pages; by windows a TIFF of one page is read.")
        pages = [page for page in some if not getattr(page, "is_reduced", False)]
        page = pages[0]
        if len(pages) != 1 or not isinstance(page, TiffPage):
            raise DataError(f"{path}: has {len(pages)} pages; by windows a TIFF of one page is read.")
        planes, depth, height, width, samples = page.shaped
        if page.dtype is None or page.dtype.kind not in "uif" or page.photometric not in (0, 1, 2) or depth != 1:
            raise DataError(f"{path}: a TIFF of {page.dtype}, {page.photometric!r}; expected gray, RGB or N channels.")
        orientation = page.tags.get(274)
        transparent = any(int(kind) in (1, 2) for kind in page.extrasamples)  # TIFF 6.0: alpha; others are channels
        if transparent or (orientation is not None and int(orientation.value) != 1):
            raise DataError(f"{path}: is transparent or turned; by windows only upright, opaque pictures are read.")
        size, offsets, counts = path.stat().st_size, page.dataoffsets, page.databytecounts
        if len(offsets) < prod(page.chunked) or any(o + c > size for o, c in zip(offsets, counts, strict=True)):
            raise DataError(f"{path}: damaged or truncated (parts of the image are missing); replace the file.")
        if prod(page.chunks) * page.dtype.itemsize > _PART:
            raise DataError(f"{path}: its parts are {page.chunks}, too large to read by windows; store it in tiles.")
        self._page, self._planes, self._samples = page, planes, samples
        self.inverted = page.photometric == 0
        self.shape, self.dtype = (planes * samples, height, width), page.dtype.newbyteorder("=")
        self.white = (1 << page.bitspersample) - 1 if self.dtype.kind == "u" else None  # packed files have fewer bits
        strips = min(int(page.rowsperstrip or height), height), width
        self._part = (page.tilelength, page.tilewidth) if page.is_tiled else strips
        self._grid = -(-height // self._part[0]), -(-width // self._part[1])
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Put together from the parts that a window touches."""
        out: NDArray[Any] = np.zeros((self.shape[0], rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        high, wide = self._part
        for plane in range(self._planes):
            for row in range(rows.start // high, -(-rows.stop // high)):
                for column in range(columns.start // wide, -(-columns.stop // wide)):
                    part = self._decoded((plane * self._grid[0] + row) * self._grid[1] + column)  # (h, w, samples)
                    top, left = row * high, column * wide
                    first, last = max(top, rows.start), min(top + part.shape[0], rows.stop)
                    start, stop = max(left, columns.start), min(left + part.shape[1], columns.stop)
                    out[
                        plane * self._samples : (plane + 1) * self._samples,
                        first - rows.start : last - rows.start,
                        start - columns.start : stop - columns.start,
                    ] = part[first - top : last - top, start - left : stop - left].transpose(2, 0, 1)
        return out

    def _decoded(self, index: int) -> NDArray[Any]:
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        page, handle = self._page, self._tiff.filehandle
        handle.seek(page.dataoffsets[index])
        count = page.databytecounts[index]
        data = handle.read(count) if count else None  # None: a sparse part, of which the file has nothing
        values, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        if values is None:
            values = np.zeros(shape, self.dtype)
        part: NDArray[Any] = np.asarray(values).reshape(shape)[0].astype(self.dtype, copy=False)
        self._kept[index] = part
        while sum(kept.nbytes for kept in self._kept.values()) > _KEPT and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return part
