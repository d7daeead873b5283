"""What was done in an output folder: ``summary.json``, and a journal while the work goes on."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from densectx.errors import ConfigError, StorageError
from densectx.inference.files import check_inside, replace, storage_error

if sys.platform != "win32":
    import fcntl

SUMMARY, JOURNAL = "summary.json", "summary.partial.jsonl"
FORMAT = 1

Entry = dict[str, Any]
"""``{path, size, mtime_ns, sha256, outputs, status, error}``; outputs are paths below the folder. Status: ``done``,
``skipped`` (done by an earlier run), ``failed``, ``started`` (interrupted while its outputs were written). Beside them
``estimated``, ``{"denoising.sigma": 24.8}``, where run-time options were found in the image itself."""


def entry_of(
    path: str, status: str, mark: Mapping[str, Any] | None = None, outputs: Sequence[str] = (), error: str | None = None
) -> Entry:
    """An entry; ``mark`` is what :func:`densectx.inference.files.fingerprint` said, as far as it got."""
    blank = {"size": None, "mtime_ns": None, "sha256": None}
    return {"path": path, **(mark or blank), "outputs": list(outputs), "status": status, "error": error}


@final
class Record:
    """The record of an output folder.

    The journal names the outputs of an input before the first of them is written: after a kill at any moment, what
    exists is known to be ours. Entries of earlier runs with the same model and options are kept as ``earlier``.

    Args:
        root: the output folder.
        head: ``{format, model, options, device}`` of this run.
        trusted: whether a summary that cannot be read is an error (else it is forgotten).
        join: whether another process has started the journal, to which this one adds its lines.

    Raises:
        ConfigError: the folder has a summary that is not ours.
        StorageError: one that cannot be read.
    """

    def __init__(self, root: Path, head: Mapping[str, Any], *, trusted: bool = True, join: bool = False) -> None:
        self.root, self.head = root, dict(head)
        self.entries: dict[str, Entry] = {}
        self._folder: int | None = None
        if join:
            self._open()
        self._seen = _stamps(root)
        try:
            before, entries = (None, {}) if join else _read(root)
        except OSError as error:
            raise StorageError(f"{error.filename}: cannot be read: {error.strerror}; name another -o.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if trusted:
                raise ConfigError(
                    f"{root / SUMMARY}: is no summary of `densectx predict`; name another -o, or --overwrite."
                ) from error
            before, entries = None, {}
        self.existed = before is not None
        self.same = before is not None and _identity(before) == _identity(self.head)
        self.carried = {key: e for key, e in entries.items() if e["status"] != "failed"} if self.same else {}

    def start(self) -> None:
        """Open the journal; the first thing that is written.

        Raises:
            ConfigError: another process writes into the folder.
            StorageError: the file system refuses.
        """
        self._lock()
        lines = [json.dumps(self.head), *(json.dumps([key, entry]) for key, entry in self.carried.items())]
        try:
            if _stamps(self.root) != self._seen:
                raise ConfigError(f"-o {self.root}: another `densectx predict` has just written there; start again.")
            replace(self.root, JOURNAL, "".join(line + "\n" for line in lines).encode())
            self._open()
        except BaseException:
            self._unlock()
            raise

    def _lock(self) -> None:
        """Be the only run in the folder until :meth:`finish`; not where its file system has no locks."""
        if sys.platform == "win32":
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._folder = os.open(self.root, os.O_RDONLY)
        except OSError as error:
            raise storage_error(self.root, error) from error
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise ConfigError(
                f"-o {self.root}: another `densectx predict` writes there; wait for its end, or name another -o."
            ) from None
        except OSError:  # NFS without a lock service
            pass

    def _unlock(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            os.close(folder)

    def _open(self) -> None:
        check_inside(self.root, [JOURNAL])
        self._journal = open(self.root / JOURNAL, "ab", buffering=0, opener=_no_link)  # noqa: SIM115 - closed by finish

    def add(self, key: str, entry: Entry) -> None:
        """Note an input under the key of its outputs; a later entry of the same key takes its place."""
        self.entries[key] = entry
        try:
            line = (json.dumps([key, entry]) + "\n").encode()
            if self._journal.write(line) != len(line):  # in one piece: other processes append to it too
                with suppress(OSError):
                    self._journal.write(b"\n")  # what they add is a line of its own
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise storage_error(self.root / JOURNAL, error) from error

    def take_in(self, keys: Iterable[str]) -> None:
        """Take the entries that other processes added, and all in the order of the keys."""
        lines = (self.root / JOURNAL).read_text(encoding="ascii").split("\n")[1 + len(self.carried) : -1]
        found = dict(_whole(lines))
        order = [*(key for key in self.entries if key.startswith("\0")), *keys]
        self.entries = {key: found[key] for key in order if key in found}

    def finish(self) -> dict[str, Any]:
        """Write the summary, remove the journal, and return what was written."""
        left = [entry for key, entry in self.carried.items() if key not in self.entries]
        summary = {**self.head, "inputs": list(self.entries.values()), "earlier": left}
        try:
            replace(self.root, SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
            self._journal.close()
            (self.root / JOURNAL).unlink(missing_ok=True)
        finally:
            self._unlock()
        return summary


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _read(root: Path) -> tuple[dict[str, Any] | None, dict[str, Entry]]:
    """Head and entries by key; (None, {}) without a record. Raises what damaged JSON raises."""
    if os.path.isfile(root / JOURNAL):
        first, *lines = (root / JOURNAL).read_text(encoding="ascii").split("\n")
        return _checked(json.loads(first)), dict(_whole(lines))
    if os.path.isfile(root / SUMMARY):
        summary = _checked(json.loads((root / SUMMARY).read_text(encoding="utf-8")))
        entries = summary["inputs"] + summary["earlier"]
        return summary, {entry["outputs"][0]: entry for entry in entries if entry["outputs"]}
    return None, {}


def _whole(lines: Iterable[str]) -> Iterator[tuple[str, Entry]]:
    """What the lines of a journal say but for those that a kill or a full disk cut short."""
    for line in lines:
        with suppress(json.JSONDecodeError):
            key, entry = json.loads(line)
            yield key, entry


def _stamps(root: Path) -> list[int | None]:
    """When journal and summary were written."""
    found: list[int | None] = []
    for name in (JOURNAL, SUMMARY):
        try:
            found.append(os.stat(root / name).st_mtime_ns)
        except OSError:
            found.append(None)
    return found


def _checked(head: dict[str, Any]) -> dict[str, Any]:
    if head["format"] != FORMAT:
        raise ValueError(head["format"])
    _identity(head)
    return head


def _identity(head: Mapping[str, Any]) -> tuple[Any, Any]:
    """What answers depend on; where the model lies and on what device it ran is not part of it."""
    return head["model"]["sha256"], head["options"]
