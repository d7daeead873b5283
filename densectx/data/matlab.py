"""MATLAB's MAT-files of version 5, read as far as what they hold goes and no further.

SciPy's reader takes memory for what a file declares: a cell array of 10^9 cells, a character array of as many spaces,
1 GB packed into 1 MB. Here parts are unpacked up to a limit, and of an array nothing is taken but its own bytes. The
format is that of MathWorks' "MAT-File Format".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from densectx.data.blob import Source, size_of, stream
from densectx.data.limits import MAX_PIXELS
from densectx.errors import DataError

MOST: Final = 3 * MAX_PIXELS
"""Bytes of a file, packed and unpacked: as many as pictures may have numbers."""

_HEADER: Final = 128  # bytes
_MATRIX, _COMPRESSED = 14, 15  # kinds of elements
_CELL, _STRUCT, _NUMBERS = 1, 2, range(6, 16)  # classes of arrays
_TYPES: Final = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


class _Element(NamedTuple):
    kind: int
    content: memoryview


@final
class Matrix:
    """An array of a file, whose content is looked at when it is asked for.

    Args:
        content: of its element.
        order: ``<`` or ``>``, of the bytes.
    """

    def __init__(self, content: memoryview, order: str) -> None:
        self._order, self._rest = order, _elements(content, order)
        flags, shape, name = (self._next().content for _ in range(3))
        self._class = int(np.frombuffer(flags, f"{order}u4")[0]) & 0xFF
        self._shape = tuple(np.frombuffer(shape, f"{order}u4").tolist())
        self.name = bytes(name).decode("latin-1")

    def _next(self) -> _Element:
        element = next(self._rest, None)
        if element is None:
            raise ValueError("an array ends too early")
        return element

    def cells(self) -> Iterator[Matrix]:
        """Those of a cell array; once."""
        if self._class != _CELL:
            raise TypeError(f"{self.name or 'a part'} is no cell array")
        return (Matrix(element.content, self._order) for element in self._rest)

    def field(self, name: str) -> Matrix:
        """One of a structure; once."""
        if self._class != _STRUCT:
            raise TypeError(f"{self.name or 'a part'} is no structure")
        length, names = int(np.frombuffer(self._next().content, f"{self._order}i4")[0]), bytes(self._next().content)
        for start in range(0, len(names), length):
            content = self._next().content
            if names[start : start + length].partition(b"\0")[0] == name.encode():
                return Matrix(content, self._order)
        raise KeyError(name)

    def numbers(self) -> NDArray[Any]:
        """Those of an array of numbers, of the type that they are stored in; read-only."""
        if self._class not in _NUMBERS:
            raise TypeError(f"{self.name or 'a part'} has no numbers")
        element = self._next()
        values: NDArray[Any] = np.frombuffer(element.content, self._order + _TYPES[element.kind])
        return values.reshape(self._shape, order="F")


def read_variable(path: Source, name: str) -> Matrix:
    """A variable of a file.

    Raises:
        DataError: the file is, or unpacks to, more than :data:`MOST` bytes.
        KeyError: it has no such variable.
        Exception: of nearly any kind, here and from the :class:`Matrix`: it is damaged, or no MAT-file of version 5.
    """
    _check(path, size_of(path))
    with stream(path) as file:
        content = memoryview(file.read())
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(bytes(content[_HEADER - 4 : _HEADER]))
    if order is None:
        raise ValueError("no MAT-file of version 5")
    total = 0
    for element in _elements(content[_HEADER:], order):
        if element.kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            kind, length = struct.unpack(f"{order}II", unpacker.decompress(element.content, 8))
            total += length
            _check(path, total)
            unpacked = unpacker.decompress(unpacker.unconsumed_tail, length + 1)  # the one more lets it reach its end
            if len(unpacked) != length or not unpacker.eof:
                raise ValueError("a packed part is not whole")
            element = _Element(kind, memoryview(unpacked))
        if element.kind == _MATRIX and (found := Matrix(element.content, order)).name == name:
            return found
    raise KeyError(name)


def _elements(content: memoryview, order: str) -> Iterator[_Element]:
    """The elements that lie one after the other."""
    at = 0
    while at < len(content):
        kind, length = struct.unpack_from(f"{order}II", content, at)
        start = at + 8
        if kind >> 16:  # of at most four bytes, which lie in the place of the length
            kind, length, start = kind & 0xFFFF, kind >> 16, at + 4
        end = start + length
        if end > len(content):
            raise ValueError("ends too early")
        yield _Element(kind, content[start:end])
        at = end if kind == _COMPRESSED else end + -end % 8


def _check(path: Source, size: int) -> None:
    if size > MOST:
        raise DataError(
            f"{path}: {size} bytes when unpacked, more than the limit of {MOST}: a decompression bomb,"
            " or an image to cut into tiles."
        )
