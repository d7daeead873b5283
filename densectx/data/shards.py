"""Samples from tar shards that ``densectx shard`` wrote, read by index.

Why not the ``wids`` of webdataset, which has the same idea (looked at in 0.2.111, the last release that brings it; 1.0
does not): at its first use every process walks the headers of every shard in Python; it verifies at most an MD5 of
whole shards, by ``assert``, and no member; local shards pass through its download cache.
What is needed here is an index that is loaded at once, checks of what is read, and the tensors of
:mod:`.shards_format`, so the reader is these few lines, without a dependency. The shards are WebDataset's layout all
the same: webdataset and ``tar`` read them.

One ``pread`` a sample: positions are no state of a file that processes share, so forked workers may inherit files, and
on a network file system nothing is mapped that can vanish under the process. Headers are compared with the index
and contents with their CRC-32, each time. Nothing is extracted, no name in an archive is ever used as a path.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch

from densectx.data.base import Dataset, Split
from densectx.data.blob import Blob
from densectx.data.shards_format import unpack
from densectx.data.shards_index import AGAIN, INDEX, Index, Table, read_table
from densectx.errors import DataError
from densectx.types import Sample

BLOCK = 512  # bytes of a tar header, and what content is padded to
_OPEN = 64  # shards that a process keeps open


@final
class Shards(Dataset):
    """The samples of one source that ``densectx shard CONFIG -o DIR`` wrote below ``DIR/<source>``.

    They are those of the original data set, bit for bit and in the same order, with the same class names, palette,
    channels and value range. Under the same name of the source, training draws the same samples with the same
    augmentation as from the original. A split that was not written has no samples.

    Alone among the data sets this one reads a file when it is built: the index, which says what the source is.

    Args:
        root: the folder of the source; relative to the working directory, ``~`` is expanded.
        split: which samples to take.

    Raises:
        DataError: the index is missing, damaged, or of another format.
    """

    def __init__(self, root: str, *, split: Split) -> None:
        self.root = Path(root).expanduser()
        try:
            index = Index.read(self.root / INDEX)
        except DataError as error:
            raise error.within("root") from None
        self.info = index.info
        self._files = index.splits.get(split)
        self._opened = _Opened()

    @cached_property
    def _table(self) -> Table:
        if self._files is None:
            return Table.of([], [], [])
        for shard in self._files.shards:
            path = self.root / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be opened: {error.strerror or error}; {AGAIN}.") from None
            if size != shard.size:
                raise DataError(f"{path}: has {size} bytes, {INDEX} says {shard.size}: not whole; {AGAIN}.")
        return read_table(self.root / self._files.table, self._files.sha256)

    @cached_property
    def _names(self) -> list[str]:
        return self._table.names.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]

    def __len__(self) -> int:
        return len(self._table.samples)

    def __getitem__(self, index: int) -> Sample:
        row = self._row(index)
        path, key = self._shard(row), f"{index:08d}"
        members = self._members(index)
        begin, end = int(members[0]["offset"]) - BLOCK, int(members[-1]["offset"] + members[-1]["size"])
        content = self._opened.read(path, begin, end - begin)
        sample: Sample = {}
        for member in members:
            extension = member["extension"].decode("ascii")
            start = int(member["offset"]) - begin
            where = f"{path}: member {key}.{extension}"
            _check_header(where, content[start - BLOCK : start], f"{key}.{extension}", int(member["size"]))
            part = content[start : start + int(member["size"])]
            if zlib.crc32(part) != member["crc"]:
                raise DataError(f"{where}: is damaged (its CRC-32 is not that of the index); {AGAIN}.")
            name = extension.partition(".")[0]
            sample[name] = unpack(name, Blob(where, part), encoded=bool(member["encoded"]), info=self.info)
            sample.setdefault("gray", torch.tensor(bool(row["gray"])))
        return sample

    def name(self, index: int) -> str:
        """``<root>/<shard>/<name in the original data set>``."""
        return f"{self._shard(self._row(index))}/{self._names[index]}"

    def all_files(self) -> list[str]:
        """The index, which has the checksums of all others, see :class:`densectx.data.base.FromFiles`."""
        return [str(self.root / INDEX)]

    def _row(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._table.samples[index]

    def _shard(self, row: Any) -> Path:
        assert self._files is not None
        return self.root / self._files.shards[int(row["shard"])].file

    def _members(self, index: int) -> Any:
        starts = self._table.samples["first"]
        end = starts[index + 1] if index + 1 < len(starts) else len(self._table.members)
        return self._table.members[int(starts[index]) : int(end)]


@final
class _Opened:
    """Files that this process has open; they are not sent to another process."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, Any] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """So many bytes from there.

        Raises:
            DataError: the file cannot be read, or ends before.
        """
        try:
            if path not in self._files:
                self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115 - closed when others take its place
                if len(self._files) > _OPEN:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(path)
            parts: list[bytes] = []
            while size > 0 and (part := os.pread(self._files[path].fileno(), size, offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}; {AGAIN}.") from None
        if size > 0:
            raise DataError(f"{path}: ends {size} bytes before byte {offset + size}, not whole; {AGAIN}.")
        return b"".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": OrderedDict()}


def _check_header(where: str, block: bytes, name: str, size: int) -> None:
    """A member must be a regular file of the name and size that the index says."""
    try:
        header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise DataError(f"{where}: its header is damaged ({error}); {AGAIN}.") from None
    if header.type != tarfile.REGTYPE:
        raise DataError(f"{where}: is no regular file but of type {header.type!r}; such shards are not ours; {AGAIN}.")
    if (header.name, header.size) != (name, size):
        raise DataError(f"{where}: its header says {header.name!r} of {header.size} bytes, not {size}; {AGAIN}.")
