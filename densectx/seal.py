"""A SHA-256 inside a file of ``torch.save``: in the comment that ends every zip archive.

The comment is ``densectx-sha256:`` and 64 hexadecimal digits, of every byte before it, the end record with the
comment's length included. torch, ``zipfile`` and memory maps read such a file as any other; a copy of it keeps the
digest, and since both are one file, no kill can part them.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import BinaryIO, final

from densectx.errors import CheckpointError

_PREFIX = b"densectx-sha256:"
_COMMENT = len(_PREFIX) + 64
_END = 22  # bytes of the end record of a zip archive without a comment
_CHUNK = 1 << 20


@final
class Sealing:
    """A file to give to ``torch.save``: hashes what goes through it; :meth:`seal` adds the digest.

    Args:
        file: binary, empty, open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None
        self._hash, self._tail = hashlib.sha256(), b""

    def write(self, data: bytes | memoryview) -> int:
        """Write all but the last bytes, which :meth:`seal` may have to change.

        torch's writer hides what the file system said behind an error of its own, so it is kept in ``error``.
        """
        view = memoryview(data)
        if len(view) < _END:
            text = self._tail + bytes(view)
            self._out(text[:-_END])
            self._tail = text[-_END:]
        else:
            self._out(self._tail)
            self._out(view[:-_END])
            self._tail = bytes(view[-_END:])
        return len(view)

    def flush(self) -> None:
        """Nothing: torch asks for it at the end of the archive, which is not yet the end of the file."""

    def seal(self) -> None:
        """Write the end record with the digest as its comment."""
        if self._tail[:4] != b"PK\5\6" or self._tail[-2:] != b"\0\0":
            raise AssertionError("torch.save did not end with the end record of a zip archive")
        self._out(self._tail[:-2] + struct.pack("<H", _COMMENT))
        self.file.write(_PREFIX + self._hash.hexdigest().encode())
        self.file.flush()

    def _out(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def check_seal(file: BinaryIO) -> bool:
    """Whether a file has a digest; one that it has is that of its content.

    Args:
        file: binary, open for reading; its position is moved.

    Returns:
        False for a zip archive without a comment: written before digests were, or by others.

    Raises:
        CheckpointError: the content is not that of the digest, or the end of the archive is missing or changed.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END - _COMMENT))
    tail = file.read()
    if not tail[-_COMMENT:].startswith(_PREFIX):
        if tail[-_END:-18] == b"PK\5\6" and tail[-2:] == b"\0\0":
            return False
        raise CheckpointError("it is cut off, damaged, or no file of torch: it does not end as those since 1.6 do.")
    digest, left = hashlib.sha256(), size - _COMMENT
    file.seek(0)
    while left > 0:
        chunk = file.read(min(_CHUNK, left))
        if not chunk:
            raise CheckpointError("it became shorter while it was read.")
        digest.update(chunk)
        left -= len(chunk)
    if digest.hexdigest().encode() != tail[-64:]:
        raise CheckpointError("it is damaged: its SHA-256 is not the one it was written with.")
    return True
