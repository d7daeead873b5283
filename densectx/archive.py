"""Files of ``torch.save``, looked over before anything in them is unpacked."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from densectx.errors import CheckpointError, brief
from densectx.seal import check_seal

DIRECTORY = 16 << 20  # bytes of an archive's table of contents: about 160,000 tensors
PICKLE = 64 << 20  # bytes of what names the tensors
HEADER = 16 << 20  # bytes of the header of a safetensors file

_ENDS = 22 + 20 + 56  # end record, zip64 locator and zip64 end record, as torch writes them


def load_archive(path: str | Path) -> Any:
    """What was saved, on the CPU, ``weights_only``; after the digest, the limits and the kind of file were checked.

    A file without a digest is compared with the checksums of its parts, and a warning says so.

    Raises:
        CheckpointError: missing, damaged, larger unpacked than as a file, or not of torch; the reason, without path.
    """
    try:
        with Path(path).open("rb") as file:  # one file from check to load, whatever is put in its place meanwhile
            if not _check(file):
                warnings.warn(f"{path}: has no SHA-256 (no digest); its parts' checksums are right.", stacklevel=2)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError("no such file.") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(why(error)) from error
    for tensor in _tensors(content):
        # views of the same numbers over and over: small as a file, of any size once copied
        if tensor.layout == torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"a tensor of shape {tuple(tensor.shape)} is larger than what the file has of it.")
    return content


def damage(path: Path) -> str:
    """Why a file of torch cannot be used, as far as that is seen without loading it; empty if it is whole."""
    try:
        with path.open("rb") as file:
            _check(file)
    except FileNotFoundError:
        return "no such file."
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def check_limits(file: BinaryIO) -> zipfile.ZipFile:
    """Refuse an archive that becomes larger than its file when it is unpacked.

    torch stores what it saves uncompressed, so the parts together are never larger than the file.

    Args:
        file: binary, open for reading; its position is moved.

    Raises:
        CheckpointError: parts that are compressed or overlap, or a table of contents or pickle over the limit.
        Exception: what ``zipfile`` raises for what is no archive.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - _ENDS - 0xFFFF))
    ends = file.read()
    at = ends.rfind(b"PK\5\6")
    listed = [struct.unpack_from("<I", ends, at + 12)[0]] if 0 <= at <= len(ends) - 22 else []
    if ends[max(0, at - 76) : at].startswith(b"PK\6\6"):
        listed.append(struct.unpack_from("<Q", ends, at - 76 + 40)[0])
    if max(listed, default=0) > DIRECTORY:
        raise CheckpointError(f"its table of contents has more than {DIRECTORY >> 20} MiB.")
    archive = zipfile.ZipFile(file)
    parts = archive.infolist()
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1:
            raise CheckpointError(f"its part {part.filename!r} is compressed or encrypted; torch stores parts as is.")
        if part.filename.endswith(".pkl") and part.file_size > PICKLE:
            raise CheckpointError(f"its part {part.filename!r} has more than {PICKLE >> 20} MiB.")
        if part.filename.endswith(".pkl") and b"\nbytearray\n" in archive.read(part):  # of any size, from few bytes
            raise CheckpointError(f"its part {part.filename!r} makes arrays of bytes; a file of torch has none.")
    if sum(part.file_size for part in parts) > size:
        raise CheckpointError("its parts are larger than the file.")
    return archive


def check_bomb(file: BinaryIO) -> None:
    """:func:`check_limits` for files of any age: those of before torch 1.6 are no archives and cannot be compressed.

    Args:
        file: binary, open for reading; ends at its start.

    Raises:
        CheckpointError: as :func:`check_limits`, or an old file that makes arrays of bytes.
        Exception: what ``zipfile`` raises for a damaged archive.
    """
    file.seek(0)
    if file.read(4) == b"PK\3\4":
        check_limits(file)
    else:
        file.seek(0)
        if b"\nbytearray\n" in file.read(PICKLE):
            raise CheckpointError("it makes arrays of bytes; a file of torch has none.")
    file.seek(0)


def why(error: Exception) -> str:
    """One line for people about a file that torch does not load; torch's own names ways around its protection."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it is damaged, or holds pickled objects or code beside tensors and plain values; it is not opened."
    return brief(error) or type(error).__name__


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is over the limit or longer than the file.

    Raises:
        CheckpointError: it is.
    """
    with path.open("rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(HEADER, path.stat().st_size - 8):
        raise CheckpointError(f"it is cut off, or its header has more than {HEADER >> 20} MiB.")


def _check(file: BinaryIO) -> bool:
    """Whether there is a digest; what there is, is right."""
    sealed = check_seal(file)
    try:
        archive = check_limits(file)
        bad = None if sealed else archive.testzip()
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # zipfile raises many kinds for a damaged file
        raise CheckpointError(f"it is damaged: {brief(error)}.") from error
    if bad:
        raise CheckpointError(f"it is damaged: the checksum of its part {bad!r} is wrong.")
    return sealed


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _tensors(part)
