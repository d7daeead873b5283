"""What each rank is at, in a small file a rank, so that those that wait can say for whom. Standard library only."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

FOLDER = "heartbeats"
"""Below the run folder."""


@final
class Heartbeat:
    """The file of this rank: ``{rank, pid, host, step, at, clock, beat, interval}``, replaced in place.

    ``clock`` is the monotonic one of its host, which starts anywhere: the least that it was seen behind the own one is
    taken for the difference of the two.

    Args:
        folder: the same for all ranks; made if its parent is there.
        rank: this one.
        interval: seconds between two beats.
    """

    def __init__(self, folder: Path, rank: int, interval: float) -> None:
        self.folder, self.interval = folder, interval
        self.folder.mkdir(exist_ok=True)
        self.path = self.folder / f"rank-{rank}"
        self._lock = threading.Lock()  # what is closed may be another file's number the next moment
        self._file: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._said: dict[str, Any] = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname(), "beat": 0}
        self._said["interval"] = interval
        self._behind: dict[int, float] = {}  # rank -> seconds, the least seen

    def beat(self, step: int, at: str, **more: Any) -> None:
        """Write: the step, what the rank does in it, and e.g. how it ends."""
        self._said |= {"step": step, "at": at, "clock": time.monotonic(), "beat": self._said["beat"] + 1, **more}
        text = json.dumps(self._said).encode().ljust(1024)
        with self._lock:
            if self._file is not None:
                os.pwrite(self._file, text, 0)
                os.fsync(self._file)  # NFS would keep it from other machines for half a minute

    def others(self) -> dict[int, dict[str, Any]]:
        """What the other ranks last wrote, and ``ago``: seconds since then, too few by what the first look missed."""
        found = {}
        for path in self.folder.glob("rank-*"):
            if path != self.path and (said := self._read(path)) is not None:
                found[int(said["rank"])] = said
        return found

    def other(self, rank: int) -> dict[str, Any] | None:
        """The same of one of them."""
        return self._read(self.path.with_name(f"rank-{rank}"))

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or just being written
            return None
        if not isinstance(found, dict):
            return None
        rank, behind = int(found["rank"]), time.monotonic() - found["clock"]
        self._behind[rank] = min(behind, self._behind.get(rank, behind))
        return {**found, "ago": behind - self._behind[rank]}

    def close(self, *, remove: bool) -> None:
        """End, with or without the file."""
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            os.close(file)
        if remove:
            self.path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove the files of a run's ranks; before any of them writes."""
    for path in (folder / FOLDER).glob("rank-*"):
        path.unlink(missing_ok=True)


def condition(said: Mapping[str, Any]) -> str:
    """How a rank does by what :class:`Heartbeat` read of it: ``gone``, ``stopped``, ``silent`` or ``alive``."""
    if said["host"] == socket.gethostname():
        try:
            state = Path(f"/proc/{said['pid']}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return "gone"
        if state in "ZX":
            return "gone"
        if state in "Tt":
            return "stopped"
    return "silent" if said["ago"] > 3 * said["interval"] + 1 else "alive"
