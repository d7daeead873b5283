"""Ranks that do not answer end the run with a message that names them, instead of a hang."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl

from densectx.data.module import data_of
from densectx.errors import DensectxError, DistributedError
from densectx.resilience.failures import explained, lost_a_rank, reason_of, waited_for
from densectx.resilience.heartbeat import FOLDER, Heartbeat, clear, condition
from densectx.resilience.preemption import Preempted
from densectx.resilience.timeouts import START, TIMEOUT, collective_timeout, start_timeout

_ENDING = 1.0  # seconds that a killed process has to disappear


@final
class Watchdog(pl.Callback):
    """Each rank writes what it is at; one that waits in vain reads whom it waits for, says so and ends with 7.

    A collective that fails (its time is up, a connection is lost) ends the process at once, since tearing a broken
    group down may hang; so does a thread where a collective never returns (NCCL): when this rank stands still and
    another has not been heard for as long as the process group waits. Stacks go to ``RUN/hang-rank-R.txt``. A rank
    that ends with an error of its own leaves it for the others, which then end with the same status.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trained = False
        self._timer: threading.Timer | None = None
        self._heart: Heartbeat | None = None
        self._folder: Path | None = None  # of the run, as the first rank knows it
        self._end = threading.Event()
        self._once = threading.Lock()  # taken by whoever reports, for ever
        self._at: tuple[int, str] = (0, "start")
        self._moved = time.monotonic()

    def __deepcopy__(self, memo: dict[int, Any]) -> Watchdog:
        return self  # averages of weights copy the module with all that hangs on it; there is one watchdog a process

    # before the ranks have met

    def expect(self, trainer: pl.Trainer) -> None:
        """Begin to wait for the other ranks."""
        if trainer.world_size == 1:
            return
        collective_timeout()  # refused here if it is no number
        seconds = start_timeout(trainer)
        self._timer = threading.Timer(seconds, self._nobody, (trainer, seconds))
        self._timer.daemon = True
        self._timer.start()

    def _nobody(self, trainer: pl.Trainer, seconds: float) -> None:
        self._report(
            trainer,
            f"rank {trainer.global_rank} of {trainer.world_size} did not meet the others within {seconds:g} s at"
            f" {_address(trainer)}. Is every rank started, is that the address of the first one's host, and is the"
            f" port free and reachable from here? {START} gives more time.",
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """They have met: begin to tell each other what they are at."""
        if self._timer is not None:
            self._timer.cancel()
        if trainer.world_size == 1:
            return
        if trainer.is_global_zero and stage == "fit":
            clear(Path(trainer.default_root_dir))  # what an earlier part of the run left
        # torchrun and srun tell only the first rank; in a folder of runs several evaluations may go on at a time
        name = FOLDER if stage == "fit" else f"{FOLDER}-{secrets.token_hex(4)}"
        own, name = trainer.strategy.broadcast((str(Path(trainer.default_root_dir).absolute()), name))
        self._folder = folder = Path(own)
        interval = min(5.0, max(0.5, collective_timeout() / 10))
        with contextlib.suppress(OSError):  # no folder that all see: then nobody is named
            folder.mkdir(parents=True, exist_ok=True)
            self._heart = Heartbeat(folder / name, trainer.global_rank, interval)
            self._mark(trainer, "set-up")
            self._heart.beat(*self._at)
            threading.Thread(target=self._watch, args=(trainer,), daemon=True, name="densectx-watchdog").start()

    # while they run

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """The loop begins."""
        self.trained = True

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Mark."""
        self._mark(trainer, "training batch")

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        """Mark."""
        self._mark(trainer, "optimizer step")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Mark."""
        self._mark(trainer, "end of a training batch")

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Mark."""
        self._mark(trainer, "validation batch")

    def on_validation_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Mark."""
        self._mark(trainer, "validation metrics")

    def on_test_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Mark."""
        self._mark(trainer, "test batch")

    def on_test_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Mark."""
        self._mark(trainer, "test metrics")

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
        """Mark."""
        self._mark(trainer, "saving")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The end of a run that ended well; its loader processes do not listen to signals."""
        data = data_of(trainer)
        _end_loaders(data.loader_pids() if data else set())
        self._close(remove=True)

    def _mark(self, trainer: pl.Trainer, at: str) -> None:
        self._at, self._moved = (trainer.global_step, at), time.monotonic()

    def _close(self, *, remove: bool) -> None:
        self._end.set()
        heart, self._heart = self._heart, None
        if heart is not None:
            heart.close(remove=remove)
            with contextlib.suppress(OSError):
                heart.folder.rmdir()  # the last one

    def _watch(self, trainer: pl.Trainer) -> None:
        """Beat; the first rank looks after all, the others after the first."""
        limit = collective_timeout()
        heard: dict[int, float] = {}  # rank -> when it wrote
        while (heart := self._heart) is not None and not self._end.wait(heart.interval):
            with contextlib.suppress(OSError):
                heart.beat(*self._at)
            # all of them once: how far their clocks are off must be known when somebody is lost
            others = heart.others() if trainer.is_global_zero or not heard else {0: heart.other(0)}
            now = time.monotonic()
            heard |= {r: now - said["ago"] for r, said in others.items() if said and (trainer.is_global_zero or r == 0)}
            silent = any(now - when > limit for when in heard.values())
            if silent and now - self._moved > limit and not self._end.is_set():
                self._report(trainer, self._story(trainer, "the other ranks", f"{limit:g} s were over"))

    # the end of a run that did not end well

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say whom a failed collective waited for; leave an own failure for the others."""
        if self._timer is not None:
            self._timer.cancel()
        data = data_of(trainer)
        _end_loaders(data.loader_pids() if data else set())
        if isinstance(exception, Preempted | KeyboardInterrupt | SystemExit):
            self._close(remove=True)
            return
        known = explained(exception, data)
        if trainer.world_size == 1:
            return
        if known is None and lost_a_rank(exception):
            reason, where = reason_of(exception), waited_for(exception.__traceback__)
            if self._heart is None:
                said = (
                    f"rank {trainer.global_rank} of {trainer.world_size} does not meet the others at"
                    f" {_address(trainer)}: {reason}"
                )
                self._report(trainer, said, exception=exception)
            else:
                self._report(trainer, self._story(trainer, where, reason), exception=exception)
            return
        if self._heart is not None:
            said = str(known) if known else f"{type(exception).__name__}: {exception}"
            with contextlib.suppress(OSError):
                self._heart.beat(*self._at, ended=said, status=known.status if known else 1)
            self._close(remove=False)

    def _story(self, trainer: pl.Trainer, where: str, reason: str) -> DensectxError | str:
        """Whom this rank waited for, or the error that another one ended with."""
        others = self._others()
        step, at = self._at
        mine = f"rank {trainer.global_rank} of {trainer.world_size} (step {step}, {at}) waited in {where} in vain"
        told = [(rank, said) for rank, said in sorted(others.items()) if "ended" in said]
        if told:
            rank, said = told[0]
            error = _Told(f"{mine}: rank {rank} ended at step {said['step']} with: {said['ended']}")
            error.status = int(said["status"])
            return error
        found = []
        for rank, said in sorted(others.items()):
            if (how := condition(said)) != "alive":
                ago = f"last heard {said['ago']:.0f} s ago at step {said['step']}, {said['at']}"
                found.append(f"rank {rank} (process {said['pid']} on {said['host']}) is {how}, {ago}")
        if not found:
            alive = (f"rank {rank} is alive at step {said['step']}, {said['at']}" for rank, said in others.items())
            found = [*alive] or ["nothing is known of the others"]
        return (
            f"{mine} ({reason}): {'; '.join(found)}. Go on from the last checkpoint with --resume {self._folder};"
            f" {TIMEOUT} gives slow ranks more time."
        )

    def _others(self) -> dict[int, dict[str, Any]]:
        """What the other ranks last wrote; a process that is ending loses its connections before it is gone."""
        until = time.monotonic() + _ENDING
        while (heart := self._heart) is not None:
            others = heart.others()
            clear = any("ended" in said or condition(said) != "alive" for said in others.values())
            if clear or time.monotonic() > until:
                return others
            time.sleep(0.05)
        return {}

    def _report(
        self, trainer: pl.Trainer, what: DensectxError | str, *, exception: BaseException | None = None
    ) -> None:
        """One message, the stacks, and the end of this process and of those that it started."""
        if not self._once.acquire(blocking=False):
            self._end.wait()  # another thread is at it and ends the process
        error = DistributedError(what) if isinstance(what, str) else what
        text = f"densectx: error: {error}\n"
        try:
            if self._heart is not None:
                path = self._heart.folder.parent / f"hang-rank-{trainer.global_rank}.txt"
                with path.open("w", encoding="utf-8") as file:
                    if exception is not None:
                        traceback.print_exception(exception, file=file)
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                text += f"densectx: stacks of this rank: {path}\n"
            elif exception is None or "--debug" in sys.argv:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
        finally:
            sys.stdout.flush()
            sys.stderr.write(text)
            sys.stderr.flush()
            launcher = trainer.strategy.launcher
            if launcher is not None and hasattr(launcher, "kill"):
                if trainer.world_size > 2:
                    time.sleep(1)  # for their own messages
                launcher.kill(signal.SIGKILL)
            os._exit(error.status)


def expect_ranks(trainer: Any) -> None:
    """Begin to wait for the other ranks of a run, see :class:`Watchdog`; call right before the trainer starts."""
    for callback in trainer.callbacks:
        if isinstance(callback, Watchdog):
            callback.expect(trainer)


def trained(trainer: Any) -> bool:
    """Whether a fit got as far as its loop."""
    return any(callback.trained for callback in trainer.callbacks if isinstance(callback, Watchdog))


class _Told(DensectxError):
    """An error of another rank, with its status."""


def _address(trainer: pl.Trainer) -> str:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None:
        return "an unknown address"
    return f"{environment.main_address}:{environment.main_port} (MASTER_ADDR:MASTER_PORT)"


def _end_loaders(pids: Collection[int]) -> None:
    """Kill what is left of the loader processes, else tearing down waits for one that hangs."""
    if not pids or threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed one
    try:
        for process in multiprocessing.active_children():
            if process.pid in pids:
                process.kill()
                process.join(5)
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
