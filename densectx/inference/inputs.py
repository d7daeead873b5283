"""Which images a command line names, and where the answers for each go."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from densectx.data.listing import files
from densectx.data.reader import extensions_of
from densectx.errors import ConfigError, DataError


@dataclass(frozen=True)
class Input:
    """An image and its place below the folder it was found in (its bare name if it was named itself)."""

    path: Path
    place: PurePosixPath


@dataclass(frozen=True)
class Found:
    """What arguments name.

    Attributes:
        images: the images.
        failures: (argument, message) where there is none.
        left_out: images of the output folder.
        unread: files in folders that are of no kind that is read, by extension.
    """

    images: list[Input]
    failures: list[tuple[str, str]]
    left_out: int
    unread: Counter[str]


@dataclass(frozen=True)
class Job:
    """An image and its outputs: (task, what follows the stem) -> path below the output folder, with slashes."""

    path: Path
    outputs: dict[tuple[str, str], str]

    @property
    def key(self) -> str:
        """Its name in the record: the first of its outputs."""
        return next(iter(self.outputs.values()))


def channels_read(channels: Iterable[int]) -> int:
    """Channels that files are read with, for the tasks of a model: 3 for those of 1 and 3 (a gray file stays gray), N.

    Args:
        channels: of the images that each task takes.

    Raises:
        ConfigError: tasks whose images cannot come from the same file.
    """
    kinds = {3 if number in (1, 3) else number for number in channels}
    if len(kinds) > 1:
        raise ConfigError(
            f"the tasks take images of {sorted(kinds)} channels, one file has only one of these; --tasks."
        )
    return kinds.pop()


def collect(arguments: Iterable[str], out: Path, tasks: Sequence[str], *, overwrite: bool, channels: int = 3) -> Found:
    """Images by argument: a file, a folder (recursive), a glob, or ``-`` for a list of files and folders on stdin.

    Hidden files are left out of folders and globs, other extensions than the reader's too; a file named itself is
    always taken. An image that is named twice counts once.

    Args:
        arguments: of the command line.
        out: the output folder, resolved; what it holds is no input where it lies inside an input folder.
        tasks: keys of the tasks, its sub-folders.
        overwrite: whether the output folder may be an input folder itself.
        channels: of the images, which decides about the extensions that are searched for.

    Raises:
        ConfigError: the output folder is an input folder and ``overwrite`` is false.
    """
    images: dict[str, Input] = {}
    failures, left_out, unread = [], 0, Counter[str]()
    extensions = extensions_of(channels)
    for argument in _with_stdin(arguments):
        try:
            found = list(_images(argument, extensions))
        except DataError as error:
            failures.append((argument, str(error)))
            continue
        own = _own(argument, out, tasks, overwrite=overwrite)
        kept = [i for i in found if not any(i.place.is_relative_to(folder) for folder in own)]
        left_out += len(found) - len(kept)
        unread.update(_unread(argument, extensions, own))
        for image in kept:
            images.setdefault(os.path.abspath(image.path), image)
    return Found(list(images.values()), failures, left_out, unread)


def plan(inputs: Sequence[Input], suffixes: Callable[[Path], Mapping[str, Iterable[str]]]) -> list[Job]:
    """Name the outputs of every image: ``<task>/<folder>/<stem><suffix>``, the whole name for the stem on a clash.

    Args:
        inputs: the images.
        suffixes: of a file: what follows the stem, by task.

    Raises:
        ConfigError: two images have the same folder and name.
    """
    whole: set[int] = set()  # inputs whose outputs carry the extension too
    while True:
        jobs, owners = [], defaultdict(list)
        for number, image in enumerate(inputs):
            stem = image.place.name if number in whole else image.place.stem
            base = f"{parent}/{stem}" if (parent := image.place.parent.as_posix()) != "." else stem
            by_task = suffixes(image.path).items()
            outputs = {(task, suffix): f"{task}/{base}{suffix}" for task, ends in by_task for suffix in ends}
            jobs.append(Job(image.path, outputs))
            for name in outputs.values():
                owners[name].append(number)
        folders = {name.rpartition("/")[0] for name in owners}
        folders |= {parent.as_posix() for folder in folders for parent in PurePosixPath(folder).parents}
        clashing = {number for name, by in owners.items() if len(by) > 1 or name in folders for number in by}
        if not clashing:
            return jobs
        if clashing <= whole:
            name, by = next((n, by) for n, by in owners.items() if len(by) > 1 or n in folders)
            both = " and ".join(str(inputs[number].path) for number in by[:2])
            raise ConfigError(f"{both} would be written to the same file or folder {name}; name their common folder.")
        whole |= clashing


def _with_stdin(arguments: Iterable[str]) -> Iterator[str]:
    for argument in arguments:
        if argument == "-":
            lines = sys.stdin.buffer.read().split(b"\n")  # bytes: names need not be valid text
            yield from (os.fsdecode(line) for line in (line.removesuffix(b"\r") for line in lines) if line)
        else:
            yield argument


def _images(argument: str, extensions: frozenset[str]) -> Iterator[Input]:
    if "\0" in argument:
        raise DataError(f"{argument!r}: is no file name, it holds a NUL; a list on stdin has one name a line.")
    if os.path.isdir(argument):
        folder = Path(argument)
        yield from (
            Input(path, PurePosixPath(path.relative_to(folder).as_posix())) for path in files(folder, extensions)
        )
    elif glob.has_magic(argument) and not os.path.lexists(argument):
        base = _before_magic(argument)
        matches = sorted(Path(name) for name in glob.iglob(argument, recursive=True))
        matches = [path for path in matches if path.suffix.lower() in extensions and path.is_file()]
        if not matches:
            raise DataError(f"{argument}: no image matches; expected one of {' '.join(sorted(extensions))}.")
        for path in matches:
            place = os.path.relpath(path, base)  # also takes `..` out of the middle
            inside = not place.startswith("..")
            yield Input(path, PurePosixPath(Path(place).as_posix() if inside else path.name))
    else:
        yield Input(Path(argument), PurePosixPath(Path(argument).name))


def _unread(argument: str, extensions: frozenset[str], own: Sequence[PurePosixPath]) -> Iterator[str]:
    """Extensions of the files in a folder that are not read, but for hidden ones and outputs; nothing for a file."""
    for parent, folders, names in os.walk(argument):
        below = PurePosixPath(Path(parent).relative_to(argument).as_posix())
        folders[:] = [name for name in folders if not name.startswith(".") and below / name not in own]
        suffixes = (os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
        yield from (suffix for suffix in suffixes if suffix not in extensions)


def _before_magic(pattern: str) -> Path:
    """The folder that a glob searches: its parts before the first one with a wildcard."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _own(argument: str, out: Path, tasks: Sequence[str], *, overwrite: bool) -> list[PurePosixPath]:
    """The parts of a searched folder that are outputs."""
    folder = os.path.isdir(argument)
    if not folder and (not glob.has_magic(argument) or os.path.lexists(argument)):
        return []
    real = Path(os.path.realpath(argument if folder else _before_magic(argument)))
    if out == real and folder and not overwrite:
        raise ConfigError(f"-o {argument}: the output folder is an input folder; name another one, or --overwrite.")
    if out == real:
        return [PurePosixPath(task) for task in tasks]
    return [PurePosixPath(out.relative_to(real).as_posix())] if out.is_relative_to(real) else []
