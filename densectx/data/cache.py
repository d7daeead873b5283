"""Decoded files kept on disk, so that later epochs need not decode them again.

An entry belongs to a path and to how it is read; it holds for one content of the file. The content is told by the
SHA-256 of the file's bytes, which are read every time: every edit is seen, also one that keeps size and time, and a
file that is only touched or rewritten with the same bytes stays valid. A file that changes while it is decoded is
not kept. A damaged entry is seen by a checksum and made anew. Entries are written whole or not at all, under a name
of their own first, so any number of processes may share a folder; nothing is ever deleted from it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias, cast, final

import PIL
import safetensors.torch
import tifffile
import torch
from torch import Tensor

from densectx.data.blob import stream
from densectx.errors import DataError, StorageError

Tensors: TypeAlias = dict[str, Tensor]

FORMAT = 1
"""Number of the layout below and of what the readers return; raise it when either changes."""

_MAGIC = b"densectx"
_DIGEST = 32  # bytes of a SHA-256


@final
class Cache:
    """A folder of decoded files.

    An entry is ``magic, SHA-256 of the source, CRC-32 of the rest, tensors in safetensors' format``. Images of 8 or 16
    bits are stored as such where that gives back the very same numbers.

    Args:
        folder: where; made when the first entry is written.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).expanduser()

    def get(self, path: Path, how: str, make: Callable[[], Tensors]) -> Tensors:
        """The kept tensors of a file, or those that ``make`` returns, which are kept then.

        Args:
            path: the file.
            how: whatever the result depends on beside the file's content.
            make: reads the file.

        Raises:
            DataError: the file cannot be read, and what ``make`` raises; nothing is kept then.
            StorageError: an entry cannot be written.
        """
        digest = content_digest(path)
        entry = self._entry(path, how)
        kept = _load(entry, digest)
        if kept is not None:
            return kept
        tensors = make()
        if content_digest(path) == digest:
            self._store(entry, digest, tensors)
        return tensors

    def _entry(self, path: Path, how: str) -> Path:
        key = json.dumps([FORMAT, PIL.__version__, tifffile.__version__, os.path.abspath(path), how])
        name = hashlib.sha256(os.fsencode(key)).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.cache"

    def _store(self, entry: Path, digest: bytes, tensors: Tensors) -> None:
        payload = safetensors.torch.save(dict(map(packed, tensors.items())))
        part = entry.with_name(f".{entry.stem}.{os.getpid()}.{secrets.token_hex(4)}.part")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(b"".join([_MAGIC, digest, zlib.crc32(payload).to_bytes(4, "big"), payload]))
                os.replace(part, entry)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StorageError(
                f"cache: {self.folder} cannot be written ({error.strerror or error}); free space, name another folder,"
                " or leave 'cache' out."
            ) from error


def content_digest(path: Path) -> bytes:
    """SHA-256 of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with stream(path) as file:
            return hashlib.file_digest(cast("io.BufferedReader", file), "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}.") from None


def _load(entry: Path, digest: bytes) -> Tensors | None:
    """None where there is no entry, or one of another content, or a damaged one."""
    try:
        content = memoryview(entry.read_bytes())
    except OSError:
        return None
    start = len(_MAGIC) + _DIGEST + 4
    payload = content[start:]
    if (
        len(content) < start
        or content[: len(_MAGIC)] != _MAGIC
        or content[len(_MAGIC) : start - 4] != digest
        or zlib.crc32(payload) != int.from_bytes(content[start - 4 : start], "big")
    ):
        return None
    return unpacked(safetensors.torch.load(bytes(payload)))


def packed(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """The smallest type that gives back the same tensor; the name says how."""
    name, tensor = item
    tensor = tensor.contiguous()
    if tensor.dtype == torch.float32:
        for kind, white, dtype in (("8", 255, torch.uint8), ("16", 65535, torch.uint16)):
            levels = (tensor.nan_to_num() * white).round().clamp(0, white)
            if torch.equal(levels / white, tensor):
                return f"{name}/{kind}", levels.to(torch.int32).to(dtype)
    if tensor.dtype == torch.int64 and tensor.numel() and 0 <= int(tensor.min()) <= int(tensor.max()) < 256:
        return f"{name}/id", tensor.to(torch.uint8)
    return f"{name}/", tensor


def unpacked(stored: Mapping[str, Tensor]) -> Tensors:
    """The inverse, by the names."""
    found: Tensors = {}
    for key, tensor in stored.items():
        name, _, kind = key.rpartition("/")
        if kind == "id":
            tensor = tensor.long()
        elif kind:
            tensor = tensor.to(torch.float32).div_(255 if kind == "8" else 65535)
        found[name] = tensor
    return found
