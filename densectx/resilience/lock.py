"""One run writes a run folder at a time: a lock that dies with its process. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from densectx.errors import ConfigError
from densectx.runs import first_rank

NAME: Final = ".lock"
"""Of the file in a run folder; it stays behind, empty, so that nobody can lock one that another has removed."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for the time of the context; only the first rank of a job asks for it.

    A record lock (``fcntl``): it ends with the process however that ends, and loader processes do not inherit it. The
    file says who holds it. What a killed run left is taken over, which is said; a holder on another host, where the
    file system does not carry locks, cannot be seen: that is said as well, and so is a file system without any locks.

    Raises:
        ConfigError: another process of this host, or of one that shares locks with it, holds the folder.
    """
    if not first_rank():
        yield
        return
    file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if why := _refused(file, folder):
            sys.stderr.write(
                f"densectx: warning: {folder} cannot be locked ({why}): see that one run at a time uses it.\n"
            )
        if (before := _content(file)) is not None:
            sys.stderr.write(f"densectx: warning: {_stale(folder, before)}\n")
        _write(file, {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%F %T")})
        try:
            yield
        finally:
            os.ftruncate(file, 0)
    finally:
        os.close(file)


def refuse_held(arguments: Sequence[str]) -> None:
    """What :func:`locked` will refuse, before anything slow is imported: ``--resume RUN|FILE`` of a run that goes on.

    Raises:
        ConfigError: another process holds the folder.
    """
    if not first_rank():
        return
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name != "--resume":
            continue
        given = Path(value if equals else following)
        for folder in (given, given.parent.parent):
            if not (folder / NAME).is_file():
                continue
            try:
                file = os.open(folder / NAME, os.O_RDWR)
            except OSError:
                continue  # not ours to write: :func:`locked` says so
            try:
                _refused(file, folder)
            finally:
                os.close(file)


def _refused(file: int, folder: Path) -> str:
    """Take the lock; why the file system has none to give (NFS without its lock service), empty if it was taken.

    Raises:
        ConfigError: another process has it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _held(folder, _content(file)) from None
        return error.strerror or str(error)
    return ""


def _held(folder: Path, holder: dict[str, Any] | None) -> ConfigError:
    who = _who(holder) if holder else "a process that has just started"
    return ConfigError(
        f"{folder}: another run writes to it: {who}. Wait for its end or stop it; a fresh start gets a folder of its"
        " own."
    )


def _stale(folder: Path, holder: dict[str, Any]) -> str:
    """What is said of a lock that its holder did not give back."""
    if holder.get("host") != socket.gethostname():
        return (
            f"{folder} was last locked by {_who(holder)}, another host: taken over. If that run still goes on, stop one"
            " of the two."
        )
    return f"{folder}: the lock of {_who(holder)}, which is gone, was left behind: taken over."


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('started')}"


def _content(file: int) -> dict[str, Any] | None:
    """Who the file names; None if it is empty or no such file."""
    try:
        found = json.loads(os.pread(file, 4096, 0) or b"null")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else None


def _write(file: int, content: dict[str, Any]) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(content).encode(), 0)
    os.fsync(file)
