"""The index of shards: where each member of each sample lies, and what it must be.

``index.json``: format, source info, and for each split its shards (file, bytes, SHA-256, samples), its table and the
SHA-256 of that; the last key is the SHA-256 of the rest. ``<split>.npz``: the table, arrays that NumPy reads without
unpickling. 10^5 samples are a few arrays, which loader processes share.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from densectx.data.shards_format import DTYPES
from densectx.errors import DataError, brief
from densectx.types import SourceInfo

FORMAT = 1
INDEX = "index.json"
AGAIN = "copy it again, or write it again with `densectx shard`"

SAMPLES = np.dtype([("shard", "<u4"), ("first", "<u8"), ("gray", "?")])
"""A sample: number of its shard, of its first member (the next sample's first is its end), whether it is gray."""

MEMBERS = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("extension", "S31"), ("encoded", "?")])
"""A member: where its content begins, bytes, CRC-32, ``image.jpg``, whether it is a tensor encoded anew."""


@final
class Shard(NamedTuple):
    """A tar file: its name, bytes, SHA-256, number of samples."""

    file: str
    size: int
    sha256: str
    samples: int


@final
class Table(NamedTuple):
    """Samples of one or more shards.

    Attributes:
        samples: of :data:`SAMPLES`.
        members: of :data:`MEMBERS`.
        names: what the samples are called in their data set: UTF-8, each ended by a NUL.
    """

    samples: NDArray[Any]
    members: NDArray[Any]
    names: NDArray[np.uint8]

    @classmethod
    def of(cls, samples: Sequence[tuple[int, int, bool]], members: Sequence[Any], names: Iterable[str]) -> Table:
        """From rows."""
        text = b"".join(name.encode("utf-8", "surrogateescape") + b"\0" for name in names)
        return cls(np.array(samples, SAMPLES), np.array(members, MEMBERS), np.frombuffer(text, np.uint8))

    @classmethod
    def joined(cls, parts: Sequence[Table]) -> Table:
        """That of several shards from those of each."""
        samples, first = [], 0
        for number, part in enumerate(parts):
            moved = part.samples.copy()
            moved["shard"], moved["first"] = number, moved["first"] + first
            samples.append(moved)
            first += len(part.members)
        members = [part.members for part in parts]
        return cls(np.concatenate(samples), np.concatenate(members), np.concatenate([part.names for part in parts]))

    def to_bytes(self) -> bytes:
        """A file of ``numpy.savez``; the same table, the same bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **self._asdict())
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Table:
        """The inverse.

        Raises:
            ValueError: it is something else.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return cls(arrays["samples"], arrays["members"], arrays["names"])
        except Exception as error:  # NumPy and zipfile raise many kinds on damaged files
            raise ValueError(f"{type(error).__name__}: {brief(error)}") from error


@final
@dataclass(frozen=True)
class SplitFiles:
    """The files of a split; ``sha256`` is that of the table."""

    table: str
    sha256: str
    shards: tuple[Shard, ...]


@final
@dataclass(frozen=True)
class Index:
    """What ``index.json`` says of a source."""

    info: SourceInfo
    splits: dict[str, SplitFiles]

    def to_bytes(self) -> bytes:
        """The file."""
        splits = {
            split: {
                "samples": sum(shard.samples for shard in files.shards),
                "table": files.table,
                "sha256": files.sha256,
                "shards": [shard._asdict() for shard in files.shards],
            }
            for split, files in self.splits.items()
        }
        content: dict[str, Any] = {"format": FORMAT, "info": self.info.to_config(), "splits": splits}
        return (json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n").encode("ascii")

    @classmethod
    def read(cls, path: Path) -> Index:
        """The index of a folder's source.

        Raises:
            DataError: it is missing, damaged, or of another format.
        """
        try:
            content = json.loads(path.read_bytes())
            if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
                raise DataError(
                    f"{path}: has format {content['format']!r}, this densectx reads {FORMAT}; use the densectx that"
                    " wrote it, or write the shards again."
                )
            if content.pop("sha256") != _digest(content):
                raise ValueError("its SHA-256 is another one")
            return cls(
                SourceInfo.from_config(content["info"]),
                {
                    split: SplitFiles(
                        _plain(files["table"]),
                        files["sha256"],
                        tuple(
                            Shard(_plain(shard["file"]), int(shard["size"]), shard["sha256"], int(shard["samples"]))
                            for shard in files["shards"]
                        ),
                    )
                    for split, files in content["splits"].items()
                },
            )
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; `densectx shard CONFIG -o DIR` writes DIR/<source>.") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror or error}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged, or no index of shards ({error}); {AGAIN}.") from None


def read_table(path: Path, sha256: str) -> Table:
    """The table of a split.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{path}: is not the table that {INDEX} names (SHA-256); {AGAIN}.")
        table = Table.from_bytes(content)
        for extension in np.unique(table.members["extension"]):
            if extension.decode("ascii").partition(".")[0] not in DTYPES:
                raise ValueError(f"members of kind {extension!r}")
        return table
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}; {AGAIN}.") from None
    except ValueError as error:
        raise DataError(f"{path}: no table of shards ({error}); {AGAIN}.") from None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def _plain(name: str) -> str:
    """A name of a file beside the index, and nothing else: an index leads nowhere else."""
    if not name or "/" in name or "\\" in name or "\0" in name or name.startswith("."):
        raise ValueError(f"{name!r} is no plain file name")
    return name
