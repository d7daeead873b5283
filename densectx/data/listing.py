"""Which files a split has: selections of sub-folders, lists and patterns, shared by the readers of folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn, final

from densectx.data.base import MissingSplitError
from densectx.data.reader import ARRAY_EXTENSIONS, EXTENSIONS
from densectx.errors import ConfigError, DataError, suggest

SPLITS = ("train", "val", "test")
_KEYS = ("from", "include", "labels")
_MISSING = "no such folder"


@dataclass(frozen=True)
class Selection:
    """What a split takes.

    Attributes:
        subsets: names of sub-folders or lists.
        include: patterns on a file's name or stem, of which one must match; empty takes all.
        labels: whether the files have labels.
    """

    subsets: tuple[str, ...]
    include: tuple[str, ...] = ()
    labels: bool = True

    def takes(self, path: str) -> bool:
        """Whether one of the patterns matches, case-sensitively on every system."""
        if not self.include:
            return True
        name = os.path.basename(path)
        stem = os.path.splitext(name)[0]
        return any(fnmatchcase(name, p) or fnmatchcase(stem, p) for p in self.include)


def selections(*layers: Mapping[str, Any] | None) -> dict[str, Selection | None]:
    """The selection of every split; later layers replace single splits of earlier ones, null takes a split away.

    Without any, a split takes the subset of its own name.

    Raises:
        ConfigError: an unknown split or key, or a value of the wrong kind.
    """
    merged: dict[str, Any] = {split: {"from": [split]} for split in SPLITS}
    for layer in layers:
        if layer is not None and not isinstance(layer, Mapping):
            raise ConfigError(f"splits: expected a mapping of {', '.join(SPLITS)}, got {layer!r}.")
        merged.update(layer or {})
    for split in merged:
        if split not in SPLITS:
            raise ConfigError(
                f"splits: unknown split {split!r}{suggest(str(split), SPLITS)} Known: {', '.join(SPLITS)}."
            )
    return {split: None if value is None else _selection(f"splits.{split}", value) for split, value in merged.items()}


def _selection(where: str, value: Any) -> Selection:
    for key in value if isinstance(value, Mapping) else ():
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}{suggest(str(key), _KEYS)} Known: {', '.join(_KEYS)}.")
    if not isinstance(value, Mapping) or "from" not in value:
        raise ConfigError(f"{where}: expected a mapping such as {{from: [train], include: ['a*']}}, got {value!r}.")
    labels = value.get("labels", True)
    if not isinstance(labels, bool):
        raise ConfigError(f"{where}.labels: expected true or false, got {labels!r}.")
    subsets = strings(f"{where}.from", value["from"])
    if not subsets:
        raise ConfigError(f"{where}.from: empty; name at least one sub-folder, or set {where} to null.")
    return Selection(subsets, strings(f"{where}.include", value.get("include")), labels)


def strings(where: str, value: Any) -> tuple[str, ...]:
    """A list of strings from a config; null gives none.

    Raises:
        ConfigError: anything else.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where}: expected a list of strings, got {value!r}.")
    return tuple(value)


def check_root(root: Path, key_path: str) -> None:
    """Refuse the folder of a data set that is not there, by the key that names it.

    Args:
        root: the folder.
        key_path: of the data set, see :class:`densectx.data.base.Dataset`.

    Raises:
        DataError: it is missing, no folder, or out of reach.
    """
    if said := _no_folder(root):
        more = where_to_look(root) if said == _MISSING else ""
        raise DataError(f"{root}: {said}{more}.", "root").within(key_path)


def check_folders(folders: Sequence[Path]) -> None:
    """Refuse folders of a split some of which are there and some are not: those are misspelt, not a missing split.

    Raises:
        DataError: naming one of each.
    """
    absent = [folder for folder in folders if missing(folder)]
    if absent and len(absent) < len(folders):
        there = next(folder for folder in folders if folder not in absent)
        raise DataError(f"{absent[0]}: {_MISSING}, though {there} is there.")


def _no_folder(path: Path) -> str:
    """Why a path is none, empty if it is one."""
    if missing(path):
        return _MISSING
    try:
        return "" if stat.S_ISDIR(os.stat(path).st_mode) else "is not a folder"
    except OSError as error:
        return f"cannot be opened: {error.strerror}"


def missing(path: Path) -> bool:
    """Whether nothing has that name; false where that cannot be known, as below a folder that may not be entered."""
    try:
        os.stat(path)
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    except ValueError:  # a name with NUL
        return True
    return False


def where_to_look(path: Path) -> str:
    """The nearest fix for a folder or file that a config names and that is not there, as the end of a sentence.

    Args:
        path: as the config gives it. Interpolation is over where data are read, so a path below the folder of
            ``${oc.env:DENSECTX_DATA,data}`` is taken for one that comes from it.
    """
    given = os.environ.get("DENSECTX_DATA")
    base = Path("data" if given is None else given)
    if not path.is_relative_to(base):
        return "; set this key to where it is"
    return (
        f"; set DENSECTX_DATA ({'not set' if given is None else f'now {given}'}) to the folder that has"
        f" {path.relative_to(base)}, if the config says ${{oc.env:DENSECTX_DATA,data}}, else this key"
    )


def files(folder: Path, extensions: Iterable[str] = EXTENSIONS) -> list[Path]:
    """Files below a folder with one of the extensions (lower case), sorted; hidden files and folders are left out.

    Raises:
        MissingSplitError: the folder is missing.
        DataError: it has no such file, or it or one below it cannot be listed.
    """
    return [folder / name for name in names(folder, extensions)]


def by_key(
    folder: Path, extensions: Iterable[str] = EXTENSIONS, suffix: str = "", *, labels: bool = False
) -> dict[str, str]:
    """Files below a folder by their relative path without extension, which is what pairs are matched by.

    Args:
        folder: where to search.
        extensions: of the files, lower case.
        suffix: end of the stems of the files that are meant; it is no part of the key, other files are left out.
        labels: see :func:`names`.

    Raises:
        MissingSplitError: as :func:`names`.
        DataError: as :func:`names`, or two files differ only in their extension.
    """
    found: dict[str, str] = {}
    for name in names(folder, extensions, labels=labels):
        key = os.path.splitext(name)[0]
        if not key.endswith(suffix):
            continue
        key = key[: len(key) - len(suffix)]
        if key in found:
            both = f"{found[key]} and {os.path.join(folder, name)}"
            raise DataError(f"{both} have the same stem; which one is meant is ambiguous.")
        found[key] = os.path.join(folder, name)
    if not found:
        raise DataError(f"{folder}: no file whose stem ends with {suffix!r}.")
    return found


def names(folder: Path, extensions: Iterable[str] = EXTENSIONS, *, labels: bool = False) -> list[str]:
    """What :func:`files` finds, relative to the folder, with slashes: texts, of which 10^5 are no burden.

    Args:
        folder: where to search.
        extensions: of the files, lower case.
        labels: whether the files belong to images. Of images a folder that is met again by a link counts once, under
            its own name; labels are found by every name that leads to them.

    Raises:
        MissingSplitError: the folder is missing, and it is that of images.
        DataError: as :func:`files`.
    """
    if said := _no_folder(folder):
        if said == _MISSING and not labels:
            raise MissingSplitError(f"{folder}: {said}.")
        more = "; of a split without labels set labels: false (splits)" if labels else ""
        raise DataError(f"{folder}: {said}{more}.")
    wanted, found, real = set(extensions), [], os.path.realpath(folder)
    seen, above = {real}, {os.fspath(folder): {real}}  # a folder -> where it and those above it really are
    for parent, folders, here in os.walk(folder, onerror=_unlistable, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        chain = above.pop(parent)
        for name in sorted(folders, key=lambda name: os.path.islink(os.path.join(parent, name))):  # links last
            path = os.path.join(parent, name)
            target = os.path.realpath(path)
            if target in (chain if labels else seen):  # a link may lead back to where we were
                folders.remove(name)
            else:
                above[path] = chain | {target}
            seen.add(target)
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        start = "" if below == "." else f"{below}/"
        found += [start + n for n in here if os.path.splitext(n)[1].lower() in wanted and not n.startswith(".")]
    if not found:
        raise DataError(f"{folder}: no file with one of the extensions {' '.join(sorted(wanted))}.")
    return sorted(found)


def _unlistable(error: OSError) -> NoReturn:
    """Else a folder that may not be read would be left out without a word."""
    raise DataError(f"{error.filename}: the folder cannot be listed: {error.strerror}; make it readable, or move it.")


def listed(path: Path, images: Mapping[str, str], suffix: str = "") -> list[str]:
    """The keys of ``images`` that a text file lists, each line one image.

    Args:
        path: the list.
        images: by key, see :func:`by_key`.
        suffix: see :func:`lines`.

    Raises:
        MissingSplitError: the list is missing.
        DataError: it is unreadable or empty, or names an image that does not exist or is ambiguous.
    """
    if missing(path):
        raise MissingSplitError(f"{path}: the list of images cannot be read: no such file.")
    keys = []
    for line in lines(path, images, suffix):
        if len(line.keys) != 1:
            folder = os.path.commonpath([os.path.dirname(image) for image in images.values()])
            what = f"is {len(line.keys)} times" if line.keys else "is not"
            raise DataError(
                f"{path}, line {line.number}: {line.name!r} {what} in {folder} (by stem and folder, any extension)."
            )
        keys += line.keys
    if not keys:
        raise DataError(f"{path}: the list of images is empty.")
    return keys


@final
class Line(NamedTuple):
    """A line of a list: its number, the name it has, without extension, and the keys of the images it names."""

    number: int
    name: str
    keys: list[str]


def lines(path: Path, images: Collection[str], suffix: str = "") -> list[Line]:
    """What every line of a list that is not blank names: one stem or path a line (its first column).

    A stem names every image that has it. A path names the images whose key it ends, or else the one whose key, of all
    the longest, ends it: folders count as far as line and key have them, so a list may have been written elsewhere.

    Names may have spaces: where the first column names no image, or has no extension and the line has one, a line that
    names an image as a whole is its name.

    Args:
        path: the list.
        images: keys, see :func:`by_key`.
        suffix: end of the stems that is no part of the keys; the list may have it or not.

    Raises:
        DataError: the list is missing or unreadable.
    """
    try:
        content = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list of images cannot be read: {error}.") from error
    by_tail: dict[str, list[str]] = {}  # every end of a key, from its stem to itself
    for key in images:
        parts = key.split("/")
        for start in range(len(parts)):
            by_tail.setdefault("/".join(parts[start:]), []).append(key)
    return [
        Line(number, *_named(line, by_tail, images, suffix)) for number, line in enumerate(content, 1) if line.strip()
    ]


def _named(line: str, by_tail: Mapping[str, list[str]], images: Collection[str], suffix: str) -> tuple[str, list[str]]:
    """The name in a line and the keys that it names; that of its first column where no image is called so."""
    whole, first = line.strip(), line.split()[0]
    names = [first]
    if "/" not in whole[len(first) :]:  # else the second column is another path
        names = [whole, first] if _is_file(whole) and not _is_file(first) else [first, whole]
    named = {name: _keys(name, by_tail, images, suffix) for name in names}
    return next((found for found in named.values() if found[1]), named[first])


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS | ARRAY_EXTENSIONS


def _keys(text: str, by_tail: Mapping[str, list[str]], images: Collection[str], suffix: str) -> tuple[str, list[str]]:
    path = PurePosixPath(text)
    folders, stem = [part for part in path.parent.parts if part != "/"], path.stem if _is_file(text) else path.name
    if stem not in by_tail:
        stem = stem.removesuffix(suffix)
    parts = [*folders, stem]
    tails = ["/".join(parts[start:]) for start in range(len(parts))]
    return tails[0], by_tail.get(tails[0]) or next(([tail] for tail in tails if tail in images), [])
