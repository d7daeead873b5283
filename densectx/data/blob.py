"""Files that are in memory already, such as the members of an archive, for the readers that take a path."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO, TypeAlias, final


@final
class Blob:
    """The bytes of a file under the name that messages give it.

    Args:
        name: for messages; its suffix says what kind of file it is, as that of a path does.
        content: all of it.
    """

    def __init__(self, name: str, content: bytes) -> None:
        self.name, self.content = name, content

    def __str__(self) -> str:
        return self.name


StrPath: TypeAlias = str | os.PathLike[str]
Source: TypeAlias = StrPath | Blob
"""What readers of files take."""


def stream(source: Source) -> BinaryIO:
    """The file, opened for reading.

    Raises:
        OSError: it cannot be opened, or is a pipe or device, which may never end.
    """
    return io.BytesIO(source.content) if isinstance(source, Blob) else open(source, "rb", opener=_open_file)


def _open_file(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its other end
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no file")
    return descriptor


def size_of(source: Source) -> int:
    """Bytes of the file.

    Raises:
        OSError: it is missing.
    """
    return len(source.content) if isinstance(source, Blob) else os.stat(source).st_size


def suffix_of(source: Source) -> str:
    """``".png"``: in lower case, with the dot."""
    return Path(str(source)).suffix.lower()
