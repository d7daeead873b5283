"""Writing shards: one split of a source into tar files of about one size, whole files or none, to be gone on with.

The same samples give the same bytes: members have no time, owner or permissions of their own. A finished shard gets
its table beside it (``.<shard>.part``) until all is done; what a killed run left is taken up after its last shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from densectx.data.base import Dataset, Located
from densectx.data.shards import BLOCK
from densectx.data.shards_format import Packed, pack
from densectx.data.shards_index import Shard, Table
from densectx.errors import DataError, StorageError

_RECORD = 20 * BLOCK  # what a tar file is a multiple of


@final
class _Packs(TorchDataset[Packed | str]):
    """Samples as members, from one on; what is wrong with one is a text, which processes can hand over."""

    def __init__(self, dataset: Dataset, start: int) -> None:
        self._dataset, self._start = dataset, start
        self._root = _common([dataset.name(index) for index in range(len(dataset))])

    def __len__(self) -> int:
        return len(self._dataset) - self._start

    def __getitem__(self, index: int) -> Packed | str:
        dataset, index = self._dataset, index + self._start
        name = dataset.name(index)
        try:
            paths = dataset.paths(index) if isinstance(dataset, Located) else {}
            return pack(dataset[index], name.removeprefix(self._root), paths, dataset.info)
        except DataError as error:
            return str(error) if name in str(error) else f"{name}: {error}"


def _common(names: list[str]) -> str:
    """The folder that all names are in, with its slash; what lies above the data is nobody's business."""
    try:
        common = os.path.commonpath([os.path.dirname(name) for name in names])
    except ValueError:  # none, or some absolute and some relative
        return ""
    return f"{common.rstrip('/')}/" if common else ""


def write_split(
    folder: Path, split: str, dataset: Dataset, size: int, workers: int, progress: Callable[[int], None]
) -> tuple[list[Shard], Table, int]:
    """Write the shards of a split, those left out that an earlier run of the same finished.

    Args:
        folder: of the source.
        split: its name.
        dataset: not empty.
        size: bytes of a shard, which one sample alone may exceed.
        workers: processes that read samples; the result does not depend on it.
        progress: told the number of samples that are written.

    Returns:
        The shards, their table, and how many members are files as they were.

    Raises:
        DataError: a sample cannot be read; it is named.
        StorageError: a file cannot be written.
    """
    done = list(_finished(folder, split))
    start = sum(shard.samples for shard, _, _ in done)
    packs = _Packs(dataset, start)
    loader = DataLoader(packs, batch_size=None, num_workers=workers, shuffle=False)
    current = _Open(folder, split, len(done))
    try:
        for index, packed in enumerate(loader if len(packs) else (), start):
            if isinstance(packed, str):
                raise DataError(f"{packed} Shards leave nothing out: mend it (densectx lint names all), then again.")
            if current.samples and current.bytes + _length(packed) > size:
                done.append(current.close())
                current = _Open(folder, split, len(done))
            current.add(index, packed)
            progress(index + 1)
        if current.samples:
            done.append(current.close())
    except OSError as error:
        raise storage_error(folder, error) from error
    finally:
        current.discard()
    return [shard for shard, _, _ in done], Table.joined([table for _, table, _ in done]), sum(n for _, _, n in done)


def _finished(folder: Path, split: str) -> Iterator[tuple[Shard, Table, int]]:
    """Shards of an earlier run that lie there whole, from the first on."""
    number = 0
    while True:
        path = folder / shard_name(split, number)
        try:
            head, _, rest = part_of(path).read_bytes().partition(b"\n")
            found = json.loads(head)
            shard = Shard(*found["shard"])
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    return
            yield shard, Table.from_bytes(rest), int(found["files"])
        except (OSError, ValueError, KeyError, TypeError):  # none, or not whole
            return
        number += 1


def shard_name(split: str, number: int) -> str:
    """``train-000000.tar``."""
    return f"{split}-{number:06d}.tar"


def part_of(path: Path) -> Path:
    """Where the table of a finished shard is kept until all are done."""
    return path.with_name(f".{path.name}.part")


def replace(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one, so that it is whole at every moment.

    Raises:
        StorageError: the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """What to raise for an error of the file system."""
    return StorageError(f"{path}: cannot be written: {error.strerror or error}; free space or choose another -o.")


@final
class _Open:
    """A shard that is being written.

    Args:
        folder: of the source.
        split: its name.
        number: of the shard.
    """

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self._path = folder / shard_name(split, number)
        self._temporary = self._path.with_name(f".{self._path.name}.new")
        self._file: Any = None
        self._hash = hashlib.sha256()
        self._rows: tuple[list[tuple[int, int, bool]], list[Any], list[str]] = ([], [], [])
        self._files = 0
        self.bytes = 0

    @property
    def samples(self) -> int:
        """How many it has."""
        return len(self._rows[0])

    def add(self, index: int, packed: Packed) -> None:
        """A sample."""
        samples, members, names = self._rows
        head = json.loads(packed.members["json"])
        samples.append((0, len(members), head["gray"]))
        names.append(head["name"])
        self._files += packed.files
        for extension, content in packed.members.items():
            offset = self._add(f"{index:08d}.{extension}", content)
            if extension != "json":
                encoded = extension.partition(".")[0] in head["tensors"]
                members.append((offset, len(content), zlib.crc32(content), extension.encode("ascii"), encoded))

    def _add(self, name: str, content: bytes) -> int:
        """A member; where its content begins."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        offset = self.bytes
        self._write(content + bytes(-len(content) % BLOCK))
        return offset

    def _write(self, content: bytes) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close or discard
        self._file.write(content)
        self._hash.update(content)
        self.bytes += len(content)

    def close(self) -> tuple[Shard, Table, int]:
        """Put the file in its place, and its table beside it."""
        self._write(bytes(2 * BLOCK))  # the end of a tar file
        self._write(bytes(-self.bytes % _RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        table = Table.of(*self._rows)
        shard = Shard(self._path.name, self.bytes, self._hash.hexdigest(), self.samples)
        head = json.dumps({"shard": shard, "files": self._files}).encode("ascii")
        replace(part_of(self._path), head + b"\n" + table.to_bytes())
        return shard, table, self._files

    def discard(self) -> None:
        """Remove what is not finished."""
        if self._file is not None:
            with suppress(OSError):  # what could not be written before
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def _length(packed: Packed) -> int:
    """Bytes of a sample in a tar file."""
    return sum(BLOCK + len(content) + -len(content) % BLOCK for content in packed.members.values())
