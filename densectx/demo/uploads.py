"""Pictures from the page: measured by their headers, then read by the reader of ``predict``.

The reader takes files: the bytes of a picture lie in a file of a name of ours, in a folder of ours, for as long as they
are read. Nothing that a client says becomes part of a path, and what it says of the format is not asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import numpy as np
from tifffile import TiffFile, TiffPage
from torch import Tensor

from densectx.data.arrays import kind_of
from densectx.data.pillow import FORMATS, opened
from densectx.demo.wire import Refusal
from densectx.errors import DataError
from densectx.inference.reading import Reading

_NPY: Final = b"\x93NUMPY"


@final
class Uploads:
    """What is taken from the page.

    Args:
        reading: how the model's files are read.
        max_bytes: of a file.
        max_pixels: of a picture.
    """

    def __init__(self, reading: Reading, max_bytes: int, max_pixels: int) -> None:
        self.reading, self.max_bytes, self.max_pixels = reading, max_bytes, max_pixels

    def check(self, content: bytes) -> tuple[int, int]:
        """(height, width) as the header says, before anything is decoded.

        Raises:
            Refusal: 400 for what is no picture, 413 for one that is too large.
        """
        with _file(content) as path:
            try:
                height, width = _size(path, self.reading.channels)
            except DataError as error:
                raise Refusal(400, without_path(error, path)) from None
        if height * width > self.max_pixels:
            raise Refusal(
                413,
                f"The picture has {height * width / 1e6:.1f} million pixels ({width} x {height}); this page takes up to"
                f" {self.max_pixels / 1e6:g} million. Make it smaller, or run densectx predict on it.",
            )
        return height, width

    def read(self, content: bytes) -> tuple[Tensor, bool, bool]:
        """(1 | C, H, W) float32, whether it has more than 8 bits a channel, whether it holds floats.

        Raises:
            DataError: damaged, or of a kind that is not read; without a path in its words.
        """
        with _file(content) as path:
            try:
                image, deep = self.reading.image(path)
                return image, deep, self.reading.real(path)
            except DataError as error:
                raise DataError(without_path(error, path)) from None


def without_path(error: Exception, path: Path) -> str:
    """The words of an error about the file, as a sentence of its own."""
    text = str(error).removeprefix(f"{path}: ").replace(str(path), "the file")
    return text[:1].upper() + text[1:]


def _size(path: Path, channels: int) -> tuple[int, int]:
    kind = kind_of(path)
    if kind == "other":
        with opened(path) as image:
            return image.height, image.width
    try:
        if kind == "npy":
            shape = np.lib.format.open_memmap(path, mode="r").shape
            if len(shape) == 3:
                shape = shape[1:] if shape[0] in (1, 3, channels) else shape[:2]
            height, width = shape
            return height, width
        with TiffFile(path) as tiff:
            page = tiff.pages.first
            if not isinstance(page, TiffPage):
                raise TypeError(type(page).__name__)
            return int(page.imagelength), int(page.imagewidth)
    except Exception as error:  # both raise nearly anything on damaged files
        kinds = f"{', '.join(FORMATS)} or NumPy's .npy"
        raise DataError(f"{path}: not a readable picture ({type(error).__name__}); expected {kinds}.") from None


@contextmanager
def _file(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="densectx-") as folder:  # nobody else may look into it
        path = Path(folder) / ("picture.npy" if content.startswith(_NPY) else "picture")
        path.write_bytes(content)
        yield path
