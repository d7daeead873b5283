"""One thread that runs the model on one picture after the other, and a short queue before it."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

import torch

from densectx.demo.answers import Answering
from densectx.demo.wire import Refusal
from densectx.errors import DensectxError

State: TypeAlias = Literal["sending", "queued", "running", "done", "failed", "cancelled"]


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@final
@dataclass(eq=False)
class Job:
    """One picture to answer for.

    Attributes:
        tasks: keys.
        options: run-time options that were given.
        told: called from any thread whenever something changed.
        content: the file, until it is read.
        state: how far it is.
        stage: what is done to it, in words.
        share: of the work done, 0..1.
        message: of a failure.
        answer: what the page is told of the answer.
    """

    tasks: Sequence[str]
    options: Mapping[str, float]
    told: Callable[[], None]
    content: bytes = b""
    state: State = "sending"
    stage: str = ""
    share: float = 0.0
    message: str = ""
    answer: dict[str, Any] = field(default_factory=dict)
    gone: threading.Event = field(default_factory=threading.Event)

    def take(self) -> bytes:
        """The file, which is not kept here any longer."""
        content, self.content = self.content, b""
        return content

    def step(self, stage: str, share: float) -> None:
        """Say how far it is.

        Raises:
            Cancelled: nobody waits for it.
        """
        if self.gone.is_set():
            raise Cancelled
        self.stage, self.share = stage, share
        self.told()


@final
class Queue:
    """Jobs in the order in which they came.

    Args:
        answering: what answers.
        length: how many may wait (or be sent) behind the one that runs.
    """

    def __init__(self, answering: Answering, length: int) -> None:
        self.answering, self.length = answering, length
        self._jobs: deque[Job] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def enter(self, job: Job) -> None:
        """Take a place before the picture is sent, so that no more of them are held than there are places.

        Raises:
            Refusal: 503, there is none.
        """
        with self._change:
            if self._closed or len(self._jobs) > self.length:
                raise Refusal(503, f"{self.length + 1} pictures are being worked on.", {"Retry-After": "1"})
            self._jobs.append(job)

    def ready(self, job: Job, content: bytes) -> None:
        """The picture of a job is there."""
        with self._change:
            job.content, job.state = content, "queued"
            self._change.notify()
        self._tell()

    def leave(self, job: Job) -> None:
        """Nobody waits for a job any more; one that runs ends at the next layer of the network."""
        job.gone.set()
        with self._change:
            if job.state in ("sending", "queued"):
                job.state, job.content = "cancelled", b""
                with suppress(ValueError):
                    self._jobs.remove(job)
        self._tell()

    def before(self, job: Job) -> int:
        """How many jobs are answered first, the running one counted."""
        with self._change:
            ahead = 0
            for other in self._jobs:
                if other is job:
                    break
                ahead += other.state in ("queued", "running")
            return ahead

    def close(self, seconds: float) -> None:
        """End the thread, within a time."""
        with self._change:
            self._closed = True
            for job in self._jobs:
                job.gone.set()
            self._change.notify()
        self._thread.join(seconds)

    def _tell(self) -> None:
        with self._change:
            waiting = [job for job in self._jobs if job.state == "queued"]
        for job in waiting:
            job.told()

    def _next(self) -> Job | None:
        def first() -> Job | None:
            return next((job for job in self._jobs if job.state == "queued"), None)

        with self._change:
            self._change.wait_for(lambda: self._closed or first() is not None)
            job = None if self._closed else first()
            if job is not None:
                job.state = "running"
            return job

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.answer = self.answering(job.take(), job.tasks, job.options, job.step)
                state: State = "done"
            except Cancelled:
                state = "cancelled"
            except Exception as error:
                state, job.message = "failed", words(error)
            with self._change:
                self._jobs.remove(job)
                job.state = state
            job.told()
            self._tell()


def words(error: Exception) -> str:
    """What the page is told of an error; one of ours goes to the console with its traceback, and not to the page."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return "This machine has too little memory for a picture of this size; make it smaller."
    if isinstance(error, DensectxError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return "Something went wrong here; the window in which densectx demo runs says what."
