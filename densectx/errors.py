"""Errors a user can cause, each with the exit status of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Self


class DensectxError(Exception):
    """Base of all errors that a user can cause; ``status`` is the exit status of the command line."""

    status = 1


class PlacedError(DensectxError):
    """An error that may know which key of a config it is about.

    Args:
        message: what is wrong, what was expected.
        path: key path in the config, as far as it is known where the error is raised.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.message, self.path = message, path

    def within(self, path: str) -> Self:
        """The same error, one level further out."""
        return type(self)(self.message, ".".join(part for part in (path, self.path) if part))


class ConfigError(PlacedError):
    """A config, an option or a call that cannot work (status 2)."""

    status = 2


class DataError(PlacedError):
    """A file or sample that is broken, missing or inconsistent (status 3)."""

    status = 3


class CheckpointError(DensectxError):
    """A checkpoint that is damaged, foreign or does not fit (status 4)."""

    status = 4


class PluginError(DensectxError):
    """An extension package that is missing, broken or in conflict (status 5)."""

    status = 5


class NumericError(DensectxError):
    """A value that is not finite (status 6)."""

    status = 6


class DistributedError(DensectxError):
    """Processes of one run that lost each other (status 7)."""

    status = 7


class StorageError(DensectxError):
    """A file system that does not take what is written (status 8)."""

    status = 8


class MemoryLimitError(DensectxError):
    """Less memory than the smallest possible step takes (status 9)."""

    status = 9


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: ``"; did you mean 'x'?"`` for the nearest known name, else ``"."``.

    A name one slip of the keyboard away (a letter missing, too many, wrong, or two exchanged) comes before those
    that only look alike: in short names one slip is half of the letters.
    """
    names = list(known)
    near = get_close_matches(name, [other for other in names if _one_slip(name, other)], n=1, cutoff=0.0)
    near = near or get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "."


def _one_slip(a: str, b: str) -> bool:
    if abs(len(a) - len(b)) > 1 or min(len(a), len(b)) < 1 or max(len(a), len(b)) < 2:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: what, the nearest known one, and all that are known."""
    names = sorted(known)
    return f"unknown {kind} {name!r}{suggest(name, names)} Known: {', '.join(names) or 'none'}."


def brief(error: object, most: int = 200) -> str:
    """What another library says of a damaged file as part of a sentence: its first line, and not all of a long one."""
    text = str(error).strip().partition("\n")[0]
    return text if len(text) <= most else f"{text[:most]}..."
