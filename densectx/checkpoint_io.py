"""Whole checkpoint files only: written under another name, synced, renamed; checked when they are read."""

from __future__ import annotations

import errno
import io
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast, final

import torch
from lightning_fabric.plugins import CheckpointIO
from torch import Tensor

from densectx.archive import load_archive
from densectx.checkpoint_files import sync_folder, temporary_of
from densectx.errors import CheckpointError, ConfigError, StorageError, brief
from densectx.fault import fault
from densectx.seal import Sealing

_FIXES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space in your quota",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "allow writing",
    errno.EIO: "the device reports errors: take another one",
}


@final
class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, then renames: a kill or a full disk never leaves half a file under a good name.

    Lightning's own way goes through ``$TMPDIR``, which on clusters is another file system: the move is a copy there.
    Each file carries the SHA-256 of its content (:mod:`densectx.seal`), which is checked when it is loaded.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write, fsync, rename, fsync the folder.

        Raises:
            ConfigError: a part, such as the state of a callback, is of kinds that no loader takes.
            StorageError: the file system refuses; what was under the name before still is.
        """
        path = Path(path)
        _check_parts(checkpoint)
        temporary = temporary_of(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fault("before-temp")
            try:
                with temporary.open("wb") as file:
                    _write(checkpoint, cast(BinaryIO, file))
                    fault("before-fsync")
                    os.fsync(file.fileno())
                fault("before-replace")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)
        except OSError as error:
            raise StorageError(refusal(path, error)) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """What was saved, on the CPU and ``weights_only`` whatever is asked for, after all checks.

        Raises:
            CheckpointError: see :func:`densectx.archive.load_archive`.
        """
        try:
            return cast(dict[str, Any], load_archive(path))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from error

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file."""
        Path(path).unlink(missing_ok=True)


def _check_parts(checkpoint: Mapping[str, Any]) -> None:
    """See that what is pickled loads again: all but the numbers of tensors, which takes no time."""
    if not (reason := _unreadable(checkpoint)):
        return
    callbacks = checkpoint.get("callbacks") or {}
    parts = {f"the state of the callback {key}": state for key, state in callbacks.items()}
    parts |= {f"the part {key!r}": part for key, part in checkpoint.items() if key != "callbacks"}
    name = next((name for name, part in parts.items() if _unreadable(part)), "a part")
    raise ConfigError(
        f"{name} cannot be read back, so that nobody could go on from the file: {reason}. Let its"
        " state_dict hold tensors and plain values (float, str, list, dict) only."
    )


def _unreadable(part: Any) -> str:
    """Why torch does not load a part as all loaders do, ``weights_only``; empty if it does."""
    file = io.BytesIO()
    try:
        torch.save(_without_numbers(part), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (OSError, MemoryError):
        raise  # of the machine, not of the part
    except Exception as error:  # whatever pickling a foreign object raises
        found = re.search(r"(?:GLOBAL|add_safe_globals\(\[)\s*([\w.]+)", str(error))
        return f"it holds {found[1]}" if found else brief(error) or type(error).__name__
    return ""


def _without_numbers(part: Any) -> Any:
    """A copy without plain tensors, in the same containers."""
    if type(part) in (Tensor, torch.nn.Parameter):
        return None
    if type(part) in (dict, OrderedDict):
        return type(part)((key, _without_numbers(value)) for key, value in part.items())
    if type(part) in (list, tuple):
        return type(part)(map(_without_numbers, part))
    return part


def _write(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    sealing = Sealing(file)
    try:
        torch.save(checkpoint, cast(BinaryIO, sealing))  # it writes and flushes, nothing else
    except RuntimeError:
        if sealing.error is None:
            raise
        raise sealing.error from None
    if os.environ.get("DENSECTX_FAULT"):
        file.flush()  # so that there is a part of a file when the process dies
    fault("half-temp")
    sealing.seal()


def refusal(path: Path, error: OSError) -> str:
    """What to tell when the file system does not take a file."""
    reason = error.strerror or str(error)
    fix = _FIXES.get(error.errno or 0, "see that its folder can be written")
    return f"{path}: cannot be written: {reason}; what was there before is as it was. Nearest fix: {fix}."
