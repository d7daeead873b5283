"""The files of a run's checkpoint folder: ``step-N.ckpt``, and relative links to some of them."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from pathlib import Path
from typing import final

from densectx.fault import fault

_STEP = re.compile(r"step-(\d+)\.ckpt")
_UNSYNCED = {errno.EINVAL, errno.ENOTSUP}  # what file systems say that cannot sync a folder
_ABANDONED = 3600  # seconds without a write after which another machine's temporary file counts as left over


@final
class StepFiles:
    """Keeps the newest files and those that links lead to.

    Args:
        folder: theirs; made when the first is written.
        keep: newest ones to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.good: set[int] = set()  # steps whose files are known to be whole: written or gone on from by this process

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step}.ckpt"

    def written(self, step: int) -> None:
        """The file of a step is whole: ``last.ckpt`` leads to it, older ones go."""
        self.good.add(step)
        fault("before-link")
        link(self.folder / "last.ckpt", self.path(step).name)
        self.prune(step)

    def point(self, name: str, step: int) -> None:
        """Let ``name.ckpt`` lead to the file of a step, if there is one."""
        if self.path(step).exists():
            link(self.folder / f"{name}.ckpt", self.path(step).name)

    def prune(self, step: int) -> None:
        """Remove files up to a step that are neither among the newest, nor the newest whole ones, nor a link's target.

        Files of later steps are there after going on from an older one; they are replaced when their step comes.
        """
        found = {n: file for n, file in steps(self.folder).items() if n <= step}
        newest = sorted(self.good & found.keys())[-self.keep :]  # after going on from a file the others are not checked
        linked = {file.resolve().name for file in self.folder.glob("*.ckpt") if file.is_symlink()}
        kept = {*newest, *sorted(found)[-self.keep :]}
        old = [file for n, file in sorted(found.items()) if n not in kept and file.name not in linked]
        if newest and old:
            fault("before-prune")
            for file in old:
                file.unlink()


def steps(folder: Path) -> dict[int, Path]:
    """{step: file} of a checkpoint folder, in no order."""
    return {step_of(file): file for file in folder.glob("step-*.ckpt") if step_of(file) >= 0 and file.is_file()}


def newest_run(root: Path, name: str) -> Path | None:
    """The newest run of a config that has a checkpoint."""
    folders = [f for f in (root / name).glob("*") if f.name.isdecimal() and steps(f / "checkpoints")]
    return max(folders, key=lambda f: int(f.name), default=None)


def step_of(file: Path) -> int:
    """The optimizer step that a file's name tells, -1 if none."""
    match = _STEP.fullmatch(file.name)
    return int(match[1]) if match else -1


def newest_first(folder: Path) -> list[Path]:
    """The step files in the order in which to go on from them.

    First those that were finished after the one that ``last.ckpt`` leads to (a kill came between file and link), then
    that one, then earlier steps; last the later steps that a run which went on from an older file left behind.
    """
    found = steps(folder)
    last = (folder / "last.ckpt").resolve()
    now = next((step for step, file in found.items() if file.name == last.name), max(found, default=0))
    if now not in found:
        return []
    written = found[now].stat().st_mtime_ns
    ahead = [step for step in found if step > now and found[step].stat().st_mtime_ns >= written]
    behind = [step for step in found if step > now and step not in ahead]
    order = [sorted(group, reverse=True) for group in (ahead, [s for s in found if s <= now], behind)]
    return [found[step] for group in order for step in group]


def link(path: Path, target: str) -> None:
    """Point a relative symbolic link at a file of the same folder, atomically."""
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """Where a file is written before it gets its name: in the same folder, named after this machine and process."""
    return path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}")


def sweep(folder: Path) -> int:
    """Remove the temporary files of processes that are gone; returns how many."""
    count, host = 0, socket.gethostname()
    for file in folder.glob("*.ckpt.tmp.*"):
        owner, _, pid = file.name.partition(".ckpt.tmp.")[2].rpartition(".")
        age = time.time() - file.lstat().st_mtime
        if not _alive(pid) if owner in ("", host) else age > _ABANDONED:
            file.unlink(missing_ok=True)
            count += 1
    return count


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system can."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
    finally:
        os.close(opened)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
