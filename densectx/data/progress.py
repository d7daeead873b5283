"""What each loader process reads, in memory that it shares with the run: for messages when one hangs or dies."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Final, final

import torch
from torch.utils.data import get_worker_info

from densectx.data.streams import Item

_IDLE: Final = -1


@final
class Progress:
    """One row a loader process: its pid, and source, pass and index of the sample it reads.

    Args:
        sources: names, in an order that all processes share.
        workers: number of loader processes.
    """

    def __init__(self, sources: Sequence[str], workers: int) -> None:
        self._sources = list(sources)
        self._rows = torch.full((workers, 4), _IDLE)
        self._rows.share_memory_()  # type: ignore[no-untyped-call]

    def start(self, item: Item) -> None:
        """This process reads an item from here on; nothing outside loader processes."""
        worker = get_worker_info()
        if worker is not None:
            source, pass_, index = item
            row = [os.getpid(), self._sources.index(source), pass_, index]
            self._rows[worker.id] = torch.tensor(row)

    def pids(self) -> list[int]:
        """Of the processes that have read something."""
        return [row[0] for row in self._rows.tolist() if row[0] != _IDLE]

    def last(self) -> list[tuple[int, str, int, int]]:
        """(pid, source, pass, index) of the last sample of each process."""
        rows = self._rows.tolist()
        return [(pid, self._sources[s], pass_, index) for pid, s, pass_, index in rows if pid != _IDLE]


def leave_signals_to_the_run(worker: int) -> None:
    """Loader processes go on when their run is told to save and leave (signals to a whole process group).

    SIGTERM ends one only if it comes from the run, which ends those that did not hear that they are not needed: torch's
    iterator cannot tell them where it is collected as part of a cycle, as after an error.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start from here on inherit it
    threading.Thread(target=_end_by_the_run, args=(os.getppid(),), daemon=True).start()


def _end_by_the_run(run: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
