"""Writing below one folder: whole files or none, and nowhere else."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from densectx.errors import ConfigError, DataError, StorageError


def replace(root: Path, name: str, content: bytes) -> None:
    """Write a file by way of a temporary one beside it, so that it is whole at every moment.

    The temporary name depends on the name alone: what a killed process left is taken up by the next one.

    Raises:
        ConfigError: a link leads out of the folder.
        DataError: the name is too long for the file system.
        StorageError: the file system refuses.
    """
    target = root / name
    check_inside(root, [name])
    part = target.with_name(f".{hashlib.sha1(os.fsencode(target.name), usedforsecurity=False).hexdigest()[:16]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        try:
            with open(part, "xb") as file:  # exclusive: follows no link
                file.write(content)
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DataError(f"{target}: the name of the output is too long for the file system.") from None
        raise storage_error(target, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """What to raise for an error of the file system."""
    return StorageError(f"{path}: cannot be written: {error.strerror or error}; free space or choose another -o.")


def check_inside(root: Path, names: Iterable[str]) -> None:
    """Refuse outputs that a link in the output folder would lead elsewhere.

    Args:
        root: the output folder, resolved.
        names: paths below it.

    Raises:
        ConfigError: a folder on the way, or the file, is a link.
    """
    checked: set[Path] = set()
    for name in names:
        target = root / name
        if target.parent not in checked and Path(os.path.realpath(target.parent)) != target.parent:
            raise ConfigError(f"{target}: a folder on the way to it is a link; remove the link or choose another -o.")
        checked.add(target.parent)
        if target.is_symlink():
            raise ConfigError(f"{target}: is a link; remove it or choose another -o.")


def fingerprint(path: Path) -> dict[str, Any]:
    """``{size, mtime_ns, sha256}`` of a file: bytes, nanoseconds, of its content.

    Raises:
        DataError: it is missing, no regular file, or unreadable.
    """
    try:
        status = path.stat()
        if not path.is_file():  # a pipe or device may never end
            raise DataError(f"{path}: is not a regular file.")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}.") from None
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}
