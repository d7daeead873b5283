"""Writing below one folder: whole files or none, and nowhere else."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, final

from densectx.errors import ConfigError, DataError, StorageError

_DESCRIPTORS: Final = {os.open, os.mkdir, os.rename, os.unlink} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")


@final
class Place:
    """Where one output appears: a part of a file that takes its name when it is whole.

    Folders are made and opened one below the other without following links, and everything happens below the last
    descriptor: a link that is put in the place of a folder while we work leads nowhere (where the system has such
    calls, as POSIX does). The part's name depends on the output's name alone: what a killed process left is taken up
    by the next one.

    Args:
        root: the output folder, resolved.
        name: of the file below it.

    Raises:
        ConfigError: a link leads out of the folder.
        DataError: the name is too long for the file system.
        StorageError: the file system refuses.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.target = root / name
        with self._errors():
            check_inside(root, [name])
        self.part = f".{hashlib.sha1(os.fsencode(self.target.name), usedforsecurity=False).hexdigest()[:16]}.part"
        self._folder: int | None = None
        self._settled = False
        with self._errors():
            root.mkdir(parents=True, exist_ok=True)
            if _DESCRIPTORS:
                self._folder = _opened_below(root, Path(name).parts[:-1])
            else:
                self.target.parent.mkdir(parents=True, exist_ok=True)

    def open(self) -> io.FileIO:
        """The part, new and empty; raises as the class."""
        with self._errors():
            with suppress(FileNotFoundError):
                os.unlink(self._path(self.part), dir_fd=self._folder)
            return io.FileIO(os.fspath(self._path(self.part)), "x+", opener=self._opener)  # exclusive: follows no link

    def _opener(self, path: str, flags: int) -> int:
        return os.open(path, flags, 0o666, dir_fd=self._folder)

    def put(self) -> None:
        """Give the part its name; raises as the class."""
        with self._errors():
            folder = self._folder
            os.replace(self._path(self.part), self._path(self.target.name), src_dir_fd=folder, dst_dir_fd=folder)
            self._close()

    def abandon(self) -> None:
        """Leave no part behind; nothing once it has its name."""
        if not self._settled:
            with suppress(OSError):
                os.unlink(self._path(self.part), dir_fd=self._folder)
            self._close()

    def _path(self, name: str) -> str | Path:
        return name if self._folder is not None else self.target.with_name(name)

    def _close(self) -> None:
        self._settled = True
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise DataError(f"{self.target}: the name of the output is too long for the file system.") from None
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _link_on_the_way(self.target) from None
            raise storage_error(self.target, error) from error


def _opened_below(root: Path, folders: Iterable[str]) -> int:
    """A descriptor of a folder, made where it is missing; links are no folders."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open(root, flags)
    try:
        for folder in folders:
            with suppress(FileExistsError):
                os.mkdir(folder, dir_fd=here)
            above, here = here, os.open(folder, flags, dir_fd=here)
            os.close(above)
    except BaseException:
        os.close(here)
        raise
    return here


def replace(root: Path, name: str, content: bytes) -> None:
    """Write a file by way of a part beside it, so that it is whole at every moment; raises as :class:`Place`."""
    place = Place(root, name)
    try:
        with place.open() as file:
            view = memoryview(content)
            while view:  # one call writes 2 GB at most
                view = view[file.write(view) :]
        place.put()
    except OSError as error:
        raise storage_error(place.target, error) from error
    finally:
        place.abandon()


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
        try:
            straight = target.parent in checked or Path(os.path.realpath(target.parent)) == target.parent
        except OSError:  # it changes while it is looked at
            straight = False
        if not straight:
            raise _link_on_the_way(target)
        checked.add(target.parent)
        if target.is_symlink():
            raise ConfigError(f"{target}: is a link; remove it or choose another -o.")


def _link_on_the_way(target: Path) -> ConfigError:
    return ConfigError(f"{target}: a folder on the way to it is a link or a file; remove that or choose another -o.")


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
