"""Whole checkpoint files only: written under another name, synced, renamed; checked when they are read."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO, cast, final

import torch
from lightning_fabric.plugins import CheckpointIO

from densectx.archive import load_archive
from densectx.checkpoint_files import sync_folder, temporary_of
from densectx.errors import CheckpointError, StorageError
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
            StorageError: the file system refuses; what was under the name before still is.
        """
        path = Path(path)
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
