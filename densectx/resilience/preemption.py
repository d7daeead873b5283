"""Signals: a run that is to stop saves at the next step boundary, all ranks at the same one."""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeAlias, TypeVar, final

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import distributed

from densectx.checkpointing import Checkpoints, stops, validation_follows
from densectx.errors import ConfigError
from densectx.limits import time_gone
from densectx.resilience.timeouts import collective_timeout

MARK: Final = "preempted"
"""File in the run folder that says that the run left before its end; whoever resumes removes it."""


class Wish(IntEnum):
    """What signals ask for; of several the greatest counts."""

    NOTHING = 0
    SAVE = 1
    LEAVE = 2
    INTERRUPT = 3


_SIGNALS: Final = {
    signal.SIGUSR1: Wish.SAVE,
    signal.SIGTERM: Wish.LEAVE,
    signal.SIGHUP: Wish.LEAVE,
    signal.SIGINT: Wish.INTERRUPT,
}
_STATUS: Final = {Wish.LEAVE: 143, Wish.INTERRUPT: 130}
_C = TypeVar("_C", bound=pl.Callback)
_Handler: TypeAlias = Any  # signal.getsignal's answer: a function, a number, or None for one that is not Python's


class Preempted(Exception):
    """A run left before its end because a signal asked for it; nothing is wrong.

    Args:
        message: for the user.
        status: of the process.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@final
class Preemption(pl.Callback):
    """SIGTERM and SIGHUP save and leave (143), SIGINT too (130; a second one leaves at once), SIGUSR1 saves.

    A handler only sets a flag; that somebody asks twice is seen by a thread. The ranks agree on the largest wish after
    an optimizer step, never inside a window of accumulation, and after those validation batches that every rank has; so
    it does not matter which rank is signalled, or how many. A validation that was left is done again by whoever goes
    on; the one after the last step or the end of the time is finished. What torchrun or Lightning's launcher started
    leaves with 0 after a barrier, since they would take anything else for a failure; the file ``RUN/preempted`` says
    what happened.

    Lightning's own handler broadcasts inside the handler, which hangs when another rank than the first is signalled;
    it is replaced once training begins. One is added to every command; listed in a config, it comes after callbacks
    that change weights (averages), since it saves what is there when it is called.

    Args:
        every_n_steps: optimizer steps between two agreements of several ranks; each is one number over gloo.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ConfigError(f"preemption: every_n_steps {every_n_steps} must be positive.", "trainer.callbacks")
        self.every_n_steps = every_n_steps
        self._wish, self._signal = Wish.NOTHING, ""
        self._before: dict[signal.Signals, _Handler] = {}
        self._group: distributed.ProcessGroup | None = None
        self._pipe: tuple[int, int] | None = None
        self._step = -1
        self._common = 0  # validation batches that every rank has

    def __deepcopy__(self, memo: dict[int, Any]) -> Preemption:
        return self  # averages of weights copy the module with all that hangs on it; there is one process group

    # handlers

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the handlers that were there before Lightning's."""
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        if trainer.world_size > 1:
            # beside NCCL: no wait for the device; without a limit of its own gloo would wait for half an hour
            limit = timedelta(seconds=collective_timeout())
            group = distributed.new_group(backend="gloo", timeout=limit)
            self._group = group if isinstance(group, distributed.ProcessGroup) else None

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first hook after Lightning's handlers, where there is a sanity check."""
        self._install(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first hook after Lightning's handlers."""
        self._install(trainer)
        self._step = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In a fit: how many batches every rank has. Otherwise signals end the process as usual."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._restore()
            return
        count = torch.tensor([int(min(sum(trainer.num_val_batches), 2**31))])
        if self._group is not None and not trainer.sanity_checking:
            distributed.all_reduce(count, op=distributed.ReduceOp.MIN, group=self._group)
        self._common = int(count)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Signals end the process as usual."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Signals end the process as usual."""
        self._restore()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Signals end the process as usual."""
        self._restore()

    def _install(self, trainer: pl.Trainer) -> None:
        if self._pipe or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            signal.signal(number, self._notice)
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=_leave_when_asked_twice, args=(self._pipe[0],), daemon=True, name="signals").start()
        if trainer.received_sigterm:  # it came to Lightning's handler
            self._wish, self._signal = max(self._wish, Wish.LEAVE), "SIGTERM"

    def _restore(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._pipe:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # the thread closes the other end
            self._pipe = None

    def _notice(self, number: int, frame: FrameType | None) -> None:
        wish = _SIGNALS[signal.Signals(number)]
        if wish > self._wish:
            self._wish, self._signal = wish, signal.Signals(number).name

    # agreement

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask after an optimizer step."""
        step = trainer.global_step
        if step == self._step:  # inside a window of accumulation
            return
        self._step = step
        if self._group is not None and step % self.every_n_steps:
            return
        wish = self._agreed(self._wish)
        if wish is Wish.NOTHING:
            return
        saved = _save(trainer, validation_due=validation_follows(trainer))
        if wish is not Wish.SAVE and not _over(trainer):
            self._leave(trainer, wish, saved)
        if trainer.is_global_zero:
            pl.utilities.rank_zero_info(f"{self._signal or 'a signal to another rank'} at step {step}: {saved}.")
        if self._wish is Wish.SAVE:
            self._wish, self._signal = Wish.NOTHING, ""

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ask whether to leave; whoever goes on does this validation again."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or batch_idx >= self._common:
            return
        if (wish := self._agreed(self._wish)) < Wish.LEAVE or _over(trainer):
            return
        for average in _callbacks(trainer, WeightAveraging):  # they stand in for the trained weights here
            average.on_validation_epoch_end(trainer, pl_module)
        self._leave(trainer, wish, _save(trainer, again=True, validation_due=True))

    def _agreed(self, wish: Wish) -> Wish:
        if self._group is None:
            return wish
        flag = torch.tensor([int(wish)])
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group)
        return Wish(int(flag))

    def _leave(self, trainer: pl.Trainer, wish: Wish, saved: str) -> None:
        folder = Path(trainer.default_root_dir)
        asked = self._signal or "a signal to another rank"
        if trainer.is_global_zero and wish is Wish.LEAVE:
            (folder / MARK).write_text(f"{asked} at step {trainer.global_step}\n", encoding="utf-8")
        if self._group is not None:
            distributed.barrier(group=self._group)
        status = _STATUS[wish]
        if wish is Wish.LEAVE and _watched(trainer):
            status = 0
        raise Preempted(f"{asked} at step {trainer.global_step}: {saved}; go on with --resume {folder}", status)


def _leave_when_asked_twice(file: int) -> None:
    """Read the numbers of signals as they come, even while the main thread waits in a collective."""
    interrupts = 0
    while numbers := os.read(file, 1):
        interrupts += numbers[0] == signal.SIGINT
        if interrupts == 2:
            os._exit(_STATUS[Wish.INTERRUPT])
    os.close(file)


def _save(trainer: pl.Trainer, *, validation_due: bool, again: bool = False) -> str:
    """Save the step that is done, also if it is saved already (``again``); what is said of it."""
    for checkpoints in _callbacks(trainer, Checkpoints):
        there = checkpoints.saved_step == trainer.global_step and not again
        done = there or checkpoints.save(trainer, validation_due=validation_due)
        return "saved" if done else "not saved, the file could not be written"
    return "not saved, checkpoints are switched off"


def _callbacks(trainer: Any, kind: type[_C]) -> list[_C]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]


def _over(trainer: pl.Trainer) -> bool:
    """Whether only the last validation is left, which is finished: then the run has its end."""
    steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return steps or stops(trainer) or time_gone(trainer) == 1.0


def _watched(trainer: pl.Trainer) -> bool:
    """Whether what started this process takes every other status than 0 for a failure."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    child = isinstance(environment, LightningEnvironment) and environment.local_rank() != 0
    return distributed.is_torchelastic_launched() or child
