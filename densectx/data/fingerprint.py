"""Which data a run is trained on: the files of each source by name, size, time and, where they are few, content.

A run keeps it as ``data.json`` in its folder; one that goes on is compared with it. Names and sizes are compared
always. A file whose time is another one (copied anew to a node, say) is read again if its content is known from
before, else it counts as changed. A file that is edited so that size and time stay is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, final

from densectx.data.base import Dataset, FromFiles, Split
from densectx.errors import DataError, StorageError

FILE = "data.json"
"""Name of the file in a run's folder."""

FORMAT = 1
CONTENT_LIMIT = 1 << 28
"""Bytes of all files of a split together up to which their content counts too, as SHA-256."""

SPLITS: tuple[Split, ...] = ("train", "val")
"""What a run depends on; the test split is not its business."""

_SHOWN = 8  # changes that a message names

Datasets: TypeAlias = Mapping[Split, Mapping[str, Dataset]]


class File(NamedTuple):
    """Size in bytes (-1: it is missing), time of the last change, SHA-256 of the content if it was taken."""

    size: int
    mtime_ns: int
    sha256: str | None


@final
@dataclass(frozen=True)
class Listing:
    """A split of a source: number of samples, and its files in order; none for a data set that names none.

    Attributes:
        samples: how many there are.
        files: by name.
        uses: SHA-256 of which file comes when, of files that come several times; empty where it is not known.
    """

    samples: int
    files: Mapping[str, File]
    uses: str = ""


Snapshot: TypeAlias = Mapping[str, Listing]
"""``"source split"`` -> its listing."""


def fingerprint(snapshot: Snapshot) -> str:
    """16 hexadecimal digits of names, sizes and known contents, for a comparison between ranks.

    Neither times nor the folder that holds the files count: nodes may have copies of their own.

    Args:
        snapshot: see :func:`take`.
    """
    digest = hashlib.sha256()
    for key, listing in snapshot.items():
        files = [[name, file.size, file.sha256] for name, file in _relative(listing.files).items()]
        digest.update(json.dumps([key, listing.samples, files, listing.uses]).encode())
    return digest.hexdigest()[:16]


def take(datasets: Datasets, known: Snapshot | None = None) -> dict[str, Listing]:
    """What the files are now; a validation split that cannot be listed is left out.

    Args:
        datasets: of a :class:`densectx.data.module.DataModule`.
        known: what they were: content is taken from there where size and time are the same.

    Raises:
        DataError: the training split of a source cannot be listed.
    """
    found: dict[str, Listing] = {}
    for split in SPLITS:
        for source, dataset in datasets[split].items():
            key = f"{source} {split}"
            before = known[key].files if known and key in known else {}
            try:
                samples = len(dataset)
                names = list(dataset.all_files()) if isinstance(dataset, FromFiles) else []
            except DataError:
                if split == "train":
                    raise
                continue
            found[key] = Listing(samples, _files(dict.fromkeys(names), before), _uses(names))
    return found


def _uses(names: Sequence[str]) -> str:
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return hashlib.sha256(json.dumps([places[name] for name in names]).encode()).hexdigest()


def _files(names: Iterable[str], known: Mapping[str, File]) -> dict[str, File]:
    files = {name: _stat(name) for name in names}
    few = sum(file.size for file in files.values()) <= CONTENT_LIMIT
    for name, file in files.items():
        old = known.get(name)
        if old is not None and old[:2] == file[:2]:
            files[name] = old
        elif file.size >= 0 and (few if old is None else old.sha256 is not None):
            files[name] = file._replace(sha256=_content(name))
    return files


def _stat(name: str) -> File:
    unusable = File(-1, 0, None)  # whoever reads it tells, or passes over it (data.on_corrupt)
    try:
        status = os.stat(name)
    except OSError:
        return unusable
    return File(status.st_size, status.st_mtime_ns, None) if stat.S_ISREG(status.st_mode) else unusable


def _content(name: str) -> str | None:
    try:
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def differences(old: Snapshot, new: Snapshot) -> Iterator[str]:
    """A sentence for every change, with the file; empty if the data are the same."""
    for key in dict.fromkeys((*old, *new)):
        if key not in old or key not in new:
            yield f"{key} is {'new' if key in new else 'gone'}"
            continue
        before, now = old[key].files, new[key].files
        if before and before.keys().isdisjoint(now):  # the folder as a whole may have been moved
            before, now = _relative(before), _relative(now)
        changes = [f"{key}: {change}" for change in _changes(before, now)]
        yield from changes
        if not changes and list(before) != list(now):
            yield f"{key}: the files come in another order"
        elif not changes and old[key].uses and old[key].uses != new[key].uses:
            yield f"{key}: files that several samples have, such as a mask, are now those of other samples"
        if not changes and old[key].samples != new[key].samples:
            yield f"{key}: {new[key].samples} samples, before {old[key].samples}"


def _changes(old: Mapping[str, File], new: Mapping[str, File]) -> Iterator[str]:
    for name, file in new.items():
        if name not in old:
            yield f"{name} is new"
            continue
        before = old[name]
        if file.size != before.size:
            yield f"{name} has {file.size} bytes, before {before.size}" if file.size >= 0 else f"{name} is gone"
        elif before.sha256 is not None and file.sha256 is not None:
            if file.sha256 != before.sha256:
                yield f"{name} has another content"
        elif file.mtime_ns != before.mtime_ns:
            yield f"{name} was changed (its time is another one, its content is not known from before)"
    yield from (f"{name} is gone" for name in old if name not in new)


def _relative(files: Mapping[str, File]) -> Mapping[str, File]:
    """By names without the folder that all have in common."""
    if not files:
        return files
    root = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in files])
    return {os.path.relpath(name, root): file for name, file in files.items()}


def compare(folder: Path, datasets: Datasets, *, allowed: bool = False) -> tuple[dict[str, Listing], str]:
    """What the data of a run are now, and what is to be said of it: ``""`` if they are as before.

    Args:
        folder: of the run that goes on.
        datasets: of a :class:`densectx.data.module.DataModule`.
        allowed: whether other data are meant.

    Raises:
        DataError: they differ and that is not meant; the first files are named.
    """
    known = read(folder)
    now = take(datasets, known)
    if known is None:
        return now, f"{folder} has no {FILE}: whether the data are those that the run began with is not known."
    changed = list(differences(known, now))
    if not changed:
        return now, ""
    shown = "; ".join(changed[:_SHOWN]) + (f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")
    if not allowed:
        raise DataError(
            f"the data differ from those that the run {folder} began with: {shown}. Put them back, or say"
            " --allow-changed data if it is meant."
        )
    return now, f"--allow-changed data: goes on with other data: {shown}."


def read(folder: Path) -> dict[str, Listing] | None:
    """What :func:`write` wrote; None without.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, known is {FORMAT}")
        return {key: _listing(listing) for key, listing in content["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); remove it to go on without a comparison of the data."
        ) from None


def _listing(content: Mapping[str, Any]) -> Listing:
    files = {name: File(*file) for name, file in content["files"].items()}
    return Listing(int(content["samples"]), files, content.get("uses", ""))  # which was not kept at first


def write(folder: Path, snapshot: Snapshot) -> None:
    """Keep it in the folder of a run, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    splits = {key: vars(listing) for key, listing in snapshot.items()}
    part = folder / f".{FILE}.part"
    try:
        part.write_text(json.dumps({"format": FORMAT, "splits": splits}) + "\n", encoding="utf-8")
        os.replace(part, folder / FILE)
    except OSError as error:
        raise StorageError(f"{folder / FILE}: cannot be written: {error.strerror or error}; free space.") from error
