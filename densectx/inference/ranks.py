"""The processes of one run: which jobs each does, and how they hear of each other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, final

import torch
from torch.distributed import Store  # type: ignore[attr-defined]  # documented there, not in its __all__
from torch.distributed.rendezvous import rendezvous

from densectx.errors import ConfigError, DistributedError
from densectx.inference.inputs import Job
from densectx.inference.launch import LAUNCHED

_CHUNK: Final = 1 << 20  # bytes: the store takes no larger values
_LOOK: Final = 0.05  # seconds between two looks into the store


@final
class Ranks:
    """This process among those of ``--devices`` or torchrun.

    The first process plans, gives each its share, and writes the summary when all have ended.

    Args:
        store: what all can read and write.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world

    @classmethod
    def joined(cls) -> Ranks | None:
        """The run that this process belongs to; None for one that is alone. Processes share the CPU's cores.

        Raises:
            ConfigError: processes on several machines.
        """
        environment = os.environ
        if LAUNCHED not in environment and "TORCHELASTIC_RUN_ID" not in environment:
            return None
        if environment.get("WORLD_SIZE", "1") == "1":
            return None
        if environment.get("LOCAL_WORLD_SIZE") != environment["WORLD_SIZE"]:
            raise ConfigError("predict: torchrun on several machines; take one, or give each machine its own list.")
        store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=5)))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(cores // world, 1))
        return cls(store, rank, world)

    def device(self, name: str) -> str:
        """The device of this process: one of its own where there are several."""
        if name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{self.rank % torch.cuda.device_count()}"

    def sharing(self, device: torch.device) -> int:
        """How many processes take memory of the same device."""
        return self.world if device.type != "cuda" else -(-self.world // torch.cuda.device_count())

    def share(self, jobs: Sequence[Job] | None, model: Path | None = None) -> list[Job]:
        """Of the first process: give every process its jobs, each job to one, and take its own.

        Args:
            jobs: None for no work.
            model: the file of the weights, for :meth:`model`: a name may lead elsewhere by now.
        """
        self.store.set("model", str(model))
        for rank in range(1, self.world):
            mine = None if jobs is None else [_plain(job) for job in jobs[rank :: self.world]]
            text = json.dumps(mine)
            parts = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
            for number, part in enumerate(parts):
                self.store.set(f"share/{rank}/{number}", part)
            self.store.set(f"share/{rank}", str(len(parts)))
        return list(jobs or ())[:: self.world]

    def shared(self) -> list[Job] | None:
        """Of another process: its jobs; None if there is no work."""
        key = f"share/{self.rank}"
        self._wait(key, None)
        parts = [self.store.get(f"{key}/{number}") for number in range(int(self.store.get(key)))]
        jobs = json.loads(b"".join(parts))
        return None if jobs is None else [_job(job) for job in jobs]

    def model(self) -> Path:
        """Of another process, after :meth:`shared`: the file that the first one's weights are from."""
        return Path(self.store.get("model").decode())

    def counted(self, progress: Callable[[int, int], None], total: int) -> Callable[[int, int], None]:
        """Progress of all processes together, shown by the first one."""
        before = 0

        def count(finished: int, mine: int) -> None:
            nonlocal before
            everybody = self.store.add("finished", finished - before)
            before = finished
            if self.rank == 0 and everybody < total:
                progress(everybody, total)

        return count

    def end(self, status: int) -> None:
        """Of another process: nothing more comes from it."""
        self.store.set(f"end/{self.rank}", str(status))

    def ended(self, seconds: float | None = None) -> int:
        """Of the first process: wait for the others; the worst of their statuses.

        Args:
            seconds: until it is enough, None for as long as it takes.
        """
        until = None if seconds is None else time.monotonic() + seconds
        keys = [f"end/{rank}" for rank in range(1, self.world)]
        return max([int(self.store.get(key)) for key in keys if self._wait(key, until)], default=0)

    def _wait(self, key: str, until: float | None) -> bool:
        """Whether a key is there; looks again and again: an interruption must get through."""
        try:
            while not self.store.check([key]):
                if until is not None and time.monotonic() > until:
                    return False
                time.sleep(_LOOK)
        except RuntimeError as error:
            raise DistributedError(f"predict: process 0 is gone ({str(error).splitlines()[0]}).") from error
        return True


def _plain(job: Job) -> list[Any]:
    return [str(job.path), [[task, suffix, name] for (task, suffix), name in job.outputs.items()]]


def _job(plain: list[Any]) -> Job:
    path, outputs = plain
    return Job(Path(path), {(task, suffix): name for task, suffix, name in outputs})
