"""Answers larger than memory: files that are filled part by part and appear when they are whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np
import tifffile
from numpy.typing import NDArray
from torch import Tensor

from densectx.inference.files import Place, storage_error

Layout: TypeAlias = Literal["gray", "rgb", "planes", "palette"]
Convert: TypeAlias = Callable[[Tensor], NDArray[Any]]
"""A part of an answer, (K, h, w) float32 -> (C, h, w) numbers of the file's type."""


@final
class FileSink:
    """One uncompressed file of pixels, a BigTIFF where it has to be, or ``.npy``; written at any place in any order.

    Args:
        root: the output folder.
        name: of the file below it; ``.npy`` is (C, H, W), anything else a TIFF.
        shape: (C, H, W) of the file.
        dtype: of its numbers.
        layout: what they are; ``planes`` for C channels one behind the other.
        convert: what makes numbers of an answer.
        palette: (R, G, B) in 0..255 of the ids 0, 1, ..., for ``palette``.

    Raises:
        ConfigError: a link leads out of the folder.
        StorageError: the file system refuses.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
        layout: Layout,
        convert: Convert,
        palette: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        self.shape, self.dtype, self.layout, self.convert = shape, dtype, layout, convert
        self._place = Place(root, name)
        self.target = self._place.target
        self._file = self._place.open()
        try:
            self._start = self._header(palette)
        except OSError as error:
            self.abandon()
            raise storage_error(self.target, error) from error

    def _header(self, palette: Sequence[tuple[int, int, int]]) -> int:
        """Fill the file with what it needs beside its numbers, and make it long enough; returns where they start."""
        if self.target.suffix == ".npy":
            header = {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": self.shape,
            }
            np.lib.format.write_array_header_1_0(self._file, header)
            start = self._file.tell()
            self._file.truncate(start + int(np.prod(self.shape)) * self.dtype.itemsize)
            return start
        channels, height, width = self.shape
        shape = {"rgb": (height, width, 3), "planes": self.shape}.get(self.layout, (height, width))
        options: dict[str, Any] = {"photometric": {"rgb": "rgb", "palette": "palette"}.get(self.layout, "minisblack")}
        if self.layout == "planes" and channels > 1:
            options["planarconfig"] = "separate"
        elif self.layout == "planes":
            shape = (height, width)
        if self.layout == "palette":
            table = np.zeros((3, 256), np.uint16)
            table[:, : len(palette)] = np.asarray(palette, np.uint16).T * 257
            options["colormap"] = table
        with tifffile.TiffWriter(self._file, bigtiff=int(np.prod(self.shape)) * self.dtype.itemsize > 2**31) as tiff:
            found = tiff.write(None, shape=shape, dtype=self.dtype, metadata=None, returnoffset=True, **options)
        assert found is not None
        return int(found[0])

    def write(self, rows: slice, columns: slice, part: Tensor) -> None:
        """See :class:`densectx.inference.tiler.Sink`.

        Raises:
            StorageError: the file system refuses.
        """
        values = np.ascontiguousarray(self.convert(part), self.dtype)
        _, height, width = self.shape
        size, inner = self.dtype.itemsize, 3 if self.layout == "rgb" else 1
        if self.layout == "rgb":
            values = np.ascontiguousarray(values.transpose(1, 2, 0))[None]
        try:
            for plane, lines in enumerate(values):
                for number, line in enumerate(lines):
                    place = ((plane * height + rows.start + number) * width + columns.start) * inner * size
                    if os.pwrite(self._file.fileno(), line, self._start + place) != line.nbytes:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise storage_error(self.target, error) from error

    def finish(self) -> None:
        """Put the whole file in its place.

        Raises:
            StorageError: the file system refuses.
        """
        try:
            os.fsync(self._file)
            self._file.close()
        except OSError as error:
            raise storage_error(self.target, error) from error
        self._place.put()

    def abandon(self) -> None:
        """Leave nothing behind that is not finished."""
        self._file.close()
        self._place.abandon()
