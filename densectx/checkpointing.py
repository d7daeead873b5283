"""When checkpoints are written, and which are the best: a callback; the files are those of ``checkpoint_io``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping
from pytorch_lightning.utilities import rank_zero_info

from densectx.checkpoint_files import StepFiles, link, steps, sweep, temporary_of
from densectx.checkpoint_io import refusal
from densectx.errors import ConfigError, PluginError, StorageError, unknown
from densectx.limits import time_gone
from densectx.module import DenseModule
from densectx.say import warn


@final
class Checkpoints(Checkpoint):
    """``step-N.ckpt`` after every validation and at the end, ``last.ckpt`` and ``best.ckpt`` as relative links.

    One is added to every ``fit`` unless the config lists one under ``trainer.callbacks``. It is called after every
    callback that is no checkpoint, so averages of the weights (EMA) have their update of a step before it is saved.
    Averages that are updated by epoch are not: that is after the epoch's last file.

    A file says whether the validation of its step is still to come: a run that ended before or in it does it when it
    goes on, also where nothing else is left. It says too whether a callback such as ``EarlyStopping`` ended the run,
    which then does not go on where the config still lists the same callbacks.

    Args:
        folder: where, null for ``checkpoints`` in the run folder, which is a link to any other; of one run only.
        every_n_steps: also after every so many optimizer steps, null for not.
        keep: newest files to keep beside those that links lead to, at least 2.
        monitor: logged metric that ``best`` follows, null for the mean over tasks of the relative change of each
            task's own metric since the first validation where it was not 0.
        mode: whether the monitored metric is to rise or fall.
        best_of_tasks: also ``best-<task>.ckpt`` by each task's own metric, where there is more than one task.
        on_error: what follows when a file cannot be written: ``stop`` ends every rank with status 8, ``warn`` goes
            on training and tries again when the next save is due.
    """

    def __init__(
        self,
        folder: str | None = None,
        every_n_steps: int | None = None,
        keep: int = 2,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        best_of_tasks: bool = False,
        on_error: Literal["stop", "warn"] = "stop",
    ) -> None:
        super().__init__()
        if keep < 2 or mode not in ("max", "min") or (every_n_steps is not None and every_n_steps < 1):
            raise ConfigError(
                f"checkpoints: keep {keep} must be at least 2, every_n_steps {every_n_steps} positive or null,"
                f" mode {mode!r} max or min."
            )
        if on_error not in ("stop", "warn"):
            raise ConfigError(f"checkpoints: on_error {on_error!r} must be stop or warn.")
        self.folder = Path(folder or "checkpoints")
        self.files = StepFiles(self.folder, keep)
        self._usual = Path("checkpoints")  # where whoever goes on looks for them
        self._stop_asked = False  # at the end of the window of accumulation
        self._limits: tuple[int, int | None, bool] | None = None  # held back until a validation is done
        self._same_callbacks = False  # in the config as in that of the run that is gone on with
        self.validation_due = False  # what was saved last, or gone on from, has the validation of its step before it
        self.stopped = False  # by a callback other than Lightning's Timer
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.best_of_tasks, self.on_error = best_of_tasks, on_error
        self.saved_step = -1
        self.best: dict[str, tuple[float, int]] = {}  # {link: (value, step)}; values only rise
        self.first: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A relative folder is one of the run; what an earlier fit of this object left is forgotten."""
        self.validation_due = self.stopped = False
        run = Path(trainer.default_root_dir)
        self.files.folder, self._usual = run / self.folder, run / "checkpoints"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that the folder can be written; mend the links of a run that was killed between file and link.

        Raises:
            ConfigError: ``monitor``, or that of an ``EarlyStopping``, is of a task and none of its metrics.
            PluginError: the ``score`` of a task names what its metrics do not compute.
            StorageError: on every rank, if the first cannot write there.
        """
        self._stop_asked = False
        if isinstance(pl_module, DenseModule):
            _check_scores(pl_module)
            _check_monitor("checkpoints", self.monitor or "", pl_module)
            listed: list[pl.Callback] = getattr(trainer, "callbacks", [])
            for callback in listed:
                if isinstance(callback, EarlyStopping):
                    _check_monitor("EarlyStopping", callback.monitor, pl_module)
        if failure := self._on_first_rank(trainer, self._prepare):
            raise StorageError(failure)
        trainer.should_stop |= self.stopped
        loop = trainer.fit_loop
        self._limits = None
        if self.validation_due:  # Lightning passes over a loop that has reached its end, with all that is called in it
            self._limits = loop.epoch_loop.max_steps, loop.max_epochs, trainer.should_stop
            if loop.epoch_loop.max_steps != -1:  # which would make it a loop that counts epochs
                loop.epoch_loop.max_steps = sys.maxsize
            loop.max_epochs, trainer.should_stop = -1, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do the validation that the run ended before, or in."""
        loop = trainer.fit_loop
        epochs = loop.epoch_progress.current.state_dict()
        if loop.restarted_mid_epoch and epochs["processed"] == epochs["ready"]:
            # from a file of an epoch's last batch: Lightning takes that epoch for done, but the next one for begun, and
            # without that count a file of it would not be one of the middle of an epoch
            loop.reset_restart_stage()
        if self._limits is not None:
            loop.epoch_loop.max_steps, loop.max_epochs, stop = self._limits
            self._limits, trainer.should_stop = None, trainer.should_stop or stop
        if not self.validation_due or not trainer.enable_validation:
            return
        rank_zero_info(f"The run ended before the validation at step {trainer.global_step} or in it; it is done now.")
        validation = loop.epoch_loop.val_loop
        trainer.validating, validation.restarting = True, False
        if isinstance(pl_module, DenseModule):
            pl_module.schedule_anew()  # a checkpoint is written behind it, with a config of these rates
        validation.run()
        trainer.training = True
        validation.reset()  # as if it had not run: at the end of an epoch the loop waits for its own

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every so many steps and at the end.

        The end is saved here and not when the loops have ended: only inside them does Lightning's state say where
        exactly to go on, and averaged weights (EMA) have not replaced the trained ones yet. A stop inside a window of
        accumulation (max_time) waits for its end: half a window cannot be gone on with.
        """
        self._stop_asked |= trainer.should_stop
        trainer.should_stop = self._stop_asked and not _within_window(trainer, batch_idx)
        step, every = trainer.global_step, self.every_n_steps
        if step != self.saved_step and (_ends(trainer) or (every and step and step % every == 0)):
            self.save(trainer, validation_due=validation_follows(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, and move the ``best`` links whose values rose."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not isinstance(pl_module, DenseModule):
            return
        before, metrics = dict(self.best), {k: float(v) for k, v in trainer.callback_metrics.items()}
        try:
            values = {"best": self.value(metrics, pl_module)}
        except ConfigError:
            self.save(trainer)  # what was trained until here is not lost by it
            raise
        if self.best_of_tasks and len(pl_module.model.tasks) > 1:
            values |= {f"best-{key}": now * sign for key, (now, sign) in task_values(metrics, pl_module).items()}
        risen = [name for name, value in values.items() if name not in before or value > before[name][0]]
        self.best |= {name: (values[name], trainer.global_step) for name in risen}
        # saved also where the step is saved: the file has to know this validation
        if not self.save(trainer, risen):
            self.best = before

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where another callback ends the run after the epoch; the file has to know that one did."""
        if stops(trainer) and (trainer.global_step != self.saved_step or _stopped(trainer) != self.stopped):
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end if nothing did; ``best`` is the last without validation."""
        if trainer.global_step != self.saved_step:
            self.save(trainer)
        if "best" not in self.best:
            self._on_first_rank(trainer, lambda: self.files.point("best", trainer.global_step))

    def value(self, metrics: Mapping[str, float], module: DenseModule) -> float:
        """What ``best`` maximises.

        Raises:
            ConfigError: the monitored metric is not logged.
        """
        if self.monitor is not None:
            if self.monitor not in metrics:
                raise ConfigError(f"checkpoints: monitor: {unknown('metric', self.monitor, metrics)}")
            now = metrics[self.monitor]  # NaN where nothing was measured, which is never the best
            return -math.inf if math.isnan(now) else now * (1 if self.mode == "max" else -1)
        changes = []
        for key, (now, sign) in task_values(metrics, module).items():
            first = self.first[key] = self.first.get(key) or now
            changes.append((now - first) / abs(first) * sign if first else 0.0)
        return sum(changes) / len(changes) if changes else -math.inf

    def save(self, trainer: pl.Trainer, best: Sequence[str] = (), *, validation_due: bool = False) -> bool:
        """Write the file of this step, then the links; a collective, so every rank calls it.

        Args:
            trainer: inside its training loop, after an optimizer step.
            best: names of links that lead to this file now.
            validation_due: whether the validation of this step is still to come, or to be done again.

        Returns:
            Whether it was written.

        Raises:
            StorageError: on every rank, if it could not be and ``on_error`` is ``stop``.
        """
        step = self.saved_step = trainer.global_step  # in the file as well; a failed step is not tried again
        self.validation_due, self.stopped = validation_due, _stopped(trainer)
        failure = ""
        try:
            trainer.save_checkpoint(self.files.path(step), False)  # everything, not weights alone
        except StorageError as error:  # of the first rank, the only one that writes
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others are
            failure = str(error)

        def links(failure: str = failure) -> None:
            if failure:
                raise StorageError(failure)
            self.files.written(step)
            for name in best:
                self.files.point(name, step)
            if best:
                self.files.prune(step)  # what they led to before

        failure = self._on_first_rank(trainer, links)
        if not failure:
            return True
        if self.on_error == "stop":
            raise StorageError(failure)
        warn(f"step {step} is not saved, training goes on: {failure}")
        return False

    def state_dict(self) -> dict[str, Any]:
        """What the ``best`` links mean so far, and what is left to do."""
        best = {name: list(found) for name, found in self.best.items()}
        value, step = best.pop("best", [-math.inf, -1])
        state = {"best_value": value, "best_step": step, "saved_step": self.saved_step}
        left = {"validation_due": self.validation_due, "stopped": self.stopped}
        return {**state, **left, "first": dict(self.first), "best_of_tasks": best}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Before :meth:`load_state_dict`: whether the callback that may have ended the run is still listed."""
        before, now = (checkpoint.get("densectx") or {}).get("config"), getattr(pl_module, "config", None)
        self._same_callbacks = bool(_listed(before)) and _listed(before) == _listed(now)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; the file that it comes from is whole."""
        self.best = {name: (value, step) for name, (value, step) in state_dict.get("best_of_tasks", {}).items()}
        if state_dict["best_step"] >= 0:
            self.best["best"] = (state_dict["best_value"], state_dict["best_step"])
        self.saved_step, self.first = state_dict["saved_step"], dict(state_dict["first"])
        self.validation_due = state_dict.get("validation_due", False)
        self.stopped = state_dict.get("stopped", False) and self._same_callbacks
        self.files.good.add(self.saved_step)

    def _prepare(self) -> None:
        """Make the folder ready, on the first rank."""
        folder = self.files.folder
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        probe = temporary_of(folder / "probe.ckpt")
        try:
            probe.write_bytes(b"")
        finally:
            probe.unlink(missing_ok=True)
        for name, (_, step) in self.best.items():
            self.files.point(name, step)
        if (usual := self._usual.resolve()) == folder.resolve():
            return
        if usual.exists() or steps(folder):
            raise StorageError(
                f"{folder} (folder of the Checkpoints in trainer.callbacks): has checkpoints of another run, or"
                f" {self._usual} those of this one, which would not be told apart; name a folder of its own, or move"
                " them there."
            )
        link(self._usual, str(folder.resolve()))

    def _on_first_rank(self, trainer: pl.Trainer, action: Callable[[], None]) -> str:
        """What an action failed with on the first rank, empty if it did not; the same on every rank."""
        failure = ""
        if trainer.is_global_zero:
            try:
                action()
            except StorageError as error:
                failure = str(error)
            except OSError as error:
                failure = refusal(Path(error.filename or self.files.folder), error)
        return str(trainer.strategy.broadcast(failure))


def _check_monitor(of: str, monitor: str, module: DenseModule) -> None:
    """What other callbacks log is not known before they do."""
    if not any(monitor.startswith(f"val/{key}/") for key in module.model.tasks):
        return
    if monitor not in (names := module.metric_names("val")):
        raise ConfigError(f"{of}: monitor: {unknown('metric', monitor, names)}", "trainer.callbacks")


def _check_scores(module: DenseModule) -> None:
    """A metric that nothing computes would be missing in tables, and its task in what ``best`` follows."""
    names = module.metric_names("val")
    for key in module.model.tasks:
        task, start = module.model.task(key), f"val/{key}/"
        known = [name.removeprefix(start) for name in names if name.startswith(start)]
        for name in (task.score.metric, f"{task.score.metric}_{task.score.baseline}"):
            if name not in known and known != ["loss"]:  # metrics that say nothing before something was counted
                raise PluginError(
                    f"task {key!r}: the metrics of {type(task).__name__} do not compute what its score names:"
                    f" {unknown('metric', name, known)} Score(metric, baseline) stands for 'metric' and"
                    " 'metric_baseline'."
                )


def task_values(metrics: Mapping[str, float], module: DenseModule) -> dict[str, tuple[float, int]]:
    """{task: (its own metric, 1 if it is to rise or -1)} of those that were measured."""
    found = {}
    for key in module.model.tasks:
        score = module.model.task(key).score
        now = metrics.get(f"val/{key}/{score.metric}", math.nan)
        if math.isfinite(now):
            found[key] = (now, 1 if score.higher_is_better else -1)
    return found


def _ends(trainer: pl.Trainer) -> bool:
    """Whether the batch that ends now is the run's last."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return stops(trainer) or bool(last_epoch and trainer.is_last_batch)


def stops(trainer: pl.Trainer) -> bool:
    """Whether a callback ends the run and Lightning lets it, which goes on to the least epochs and steps."""
    least = trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return trainer.should_stop and least


def was_stopped(trainer: Any) -> bool:
    """Whether a callback ended the run that goes on, or this one."""
    return any(callback.stopped for callback in trainer.callbacks if isinstance(callback, Checkpoints))


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates right after the batch that ends now; nothing public tells."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _stopped(trainer: pl.Trainer) -> bool:
    """Whether a callback ends the run; a limit of time, which may be raised, does not count."""
    return stops(trainer) and time_gone(trainer) != 1.0


def _listed(config: Any) -> Any:
    """The callbacks of a config."""
    return ((config or {}).get("trainer") or {}).get("callbacks")


def _within_window(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether gradients of the batch that ends now wait for those of later ones."""
    return bool((batch_idx + 1) % trainer.accumulate_grad_batches) and not trainer.is_last_batch
