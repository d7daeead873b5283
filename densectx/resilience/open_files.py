"""How many files a process may hold open."""

from __future__ import annotations

import re
import resource
from contextlib import suppress
from typing import Final

_ENOUGH: Final = 65536  # not the hard limit itself, which may be 10^9: programs that close all files would take long
_SAID: Final = re.compile(r"received 0 items of ancdata|Too many open files(?! in system)")  # by torch and the system


def allow_open_files() -> None:
    """Let this process and its children hold 65536 files open, or as many as the hard limit allows.

    Every tensor that a loader process hands over is an open file as long as it is in use: those of the batches of a
    window of gradient accumulation and of those fetched ahead are more than the usual soft limit, 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(_ENOUGH, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # a system may have a limit below the hard one, as macOS
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def too_many_open_files(said: str) -> str:
    """What to do about an error that says that the limit is reached; empty if it says something else."""
    if not _SAID.search(said):
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    larger = "unlimited" if hard == resource.RLIM_INFINITY else hard
    more = f"ulimit -n {larger}" if soft != hard else "a larger hard limit (docker run --ulimit nofile=N)"
    return (
        f"too many open files: a process may hold {soft}, and every tensor that loader processes hand over is one"
        f" until its step is done. Allow more: {more}; or take a smaller trainer.accumulate_grad_batches, or"
        " data.num_workers: 0."
    )
