"""Which files a split has: selections of sub-folders, lists and patterns, shared by the readers of folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from densectx.data.reader import EXTENSIONS
from densectx.errors import ConfigError, DataError, suggest

SPLITS = ("train", "val", "test")
_KEYS = ("from", "include", "labels")


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

    def takes(self, path: Path) -> bool:
        """Whether one of the patterns matches, case-sensitively on every system."""
        return not self.include or any(fnmatchcase(path.name, p) or fnmatchcase(path.stem, p) for p in self.include)


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
    if not isinstance(value, Mapping) or "from" not in value:
        raise ConfigError(f"{where}: expected a mapping such as {{from: [train], include: ['a*']}}, got {value!r}.")
    for key in value:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}{suggest(str(key), _KEYS)} Known: {', '.join(_KEYS)}.")
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


def files(folder: Path, extensions: Iterable[str] = EXTENSIONS) -> list[Path]:
    """Files below a folder with one of the extensions (lower case), sorted; hidden files and folders are left out.

    Raises:
        DataError: the folder is missing or has no such file.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}.")
    wanted, seen, found = set(extensions), {os.path.realpath(folder)}, []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in list(folders):  # links may lead back to where we were
            target = os.path.realpath(os.path.join(parent, name))
            if target in seen:
                folders.remove(name)
            seen.add(target)
        found += [Path(parent, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in wanted]
    if not found:
        raise DataError(f"{folder}: no file with one of the extensions {' '.join(sorted(wanted))}.")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def by_key(folder: Path, extensions: Iterable[str] = EXTENSIONS) -> dict[str, Path]:
    """Files below a folder by their relative path without extension, which is what pairs are matched by.

    Raises:
        DataError: as :func:`files`, or two files differ only in their extension.
    """
    found: dict[str, Path] = {}
    for path in files(folder, extensions):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in found:
            raise DataError(f"{found[key]} and {path} have the same stem; which one is meant is ambiguous.")
        found[key] = path
    return found


def listed(path: Path, images: Mapping[str, Path]) -> list[str]:
    """The keys of ``images`` that a text file lists: one stem or path a line (its first column), matched by stem.

    Raises:
        DataError: the list is missing, unreadable or empty, or names an image that does not exist or is ambiguous.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list of images cannot be read: {error}.") from error
    by_stem: dict[str, list[str]] = {}
    for key in images:
        by_stem.setdefault(key.rpartition("/")[2], []).append(key)
    keys = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = Path(line.split()[0])
        stem = name.stem if name.suffix.lower() in EXTENSIONS else name.name
        matches = by_stem.get(stem, [])
        if len(matches) != 1:
            folder = os.path.commonpath([path.parent for path in images.values()])
            what = "is not" if not matches else f"is {len(matches)} times"
            raise DataError(f"{path}, line {number}: {stem!r} {what} in {folder} (matched by stem, any extension).")
        keys += matches
    if not keys:
        raise DataError(f"{path}: the list of images is empty.")
    return keys
