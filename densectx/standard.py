"""The standard streams of a command: closed ones, pipes whose reader is gone, full disks."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, Final, TextIO, final

from densectx.errors import StorageError

_NAMES: Final = ("stdin", "stdout", "stderr")


def prepare() -> None:
    """Make the standard streams of this process such that work does not depend on who reads them.

    A closed one (``>&-``) is the null device. What is written into a pipe whose reader is gone, as behind ``| head``,
    is lost without a word: the work goes on and has its own status. So it is with messages (stderr) on a disk that is
    full; results (stdout) there are a StorageError.
    """
    for number, name in enumerate(_NAMES):  # in this order: what is opened first has the number of the closed one
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115 - stays open
        elif number and isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            setattr(sys, name, _lasting(stream, results=name == "stdout"))


def _lasting(stream: io.TextIOWrapper, *, results: bool) -> io.TextIOWrapper:
    """The same stream on a :class:`_File`."""
    stream.flush()
    file = _File(stream.fileno(), results=results)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),  # the former as Python with -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


@final
class _File(io.FileIO):
    """A descriptor that leads to the null device once it takes nothing more.

    Args:
        descriptor: stays open.
        results: whether somebody waits for what is written.
    """

    def __init__(self, descriptor: int, *, results: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.results = results

    def write(self, data: Any, /) -> int:
        """As any file's.

        Raises:
            StorageError: the first time that the system refuses results, but for a pipe without a reader.
        """
        try:
            return super().write(data)
        except OSError as error:
            self._leave()
            if self.results and not isinstance(error, BrokenPipeError):
                raise StorageError(
                    f"standard output cannot be written: {error.strerror}; free space or send it elsewhere."
                ) from error
            return super().write(data)

    def _leave(self) -> None:
        """Lead what comes now, also from child processes, nowhere."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
