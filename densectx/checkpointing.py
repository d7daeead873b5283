"""Writing checkpoints: whole files only, the best and the last by relative links."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from densectx.errors import ConfigError, unknown
from densectx.module import DenseModule


@final
class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames: a kill or a full disk never leaves half a file under a good name.

    Lightning's own way goes through ``$TMPDIR``, which on clusters is another file system: the move is a copy there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write, fsync, rename, fsync the folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@final
class Checkpoints(Checkpoint):
    """``step-N.ckpt`` after every validation and at the end, ``last.ckpt`` and ``best.ckpt`` as relative links.

    One is added to every ``fit`` unless the config lists one under ``trainer.callbacks``.

    Args:
        folder: where, null for ``checkpoints`` in the run folder; made when the first file is written.
        every_n_steps: also after every so many optimizer steps, null for not.
        keep: newest files to keep beside the best one, at least 2.
        monitor: logged metric that ``best`` follows, null for the mean over tasks of the relative change of each
            task's own metric since the first validation.
        mode: whether the monitored metric is to rise or fall.
    """

    def __init__(
        self,
        folder: str | None = None,
        every_n_steps: int | None = None,
        keep: int = 2,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        super().__init__()
        if keep < 2 or mode not in ("max", "min") or (every_n_steps is not None and every_n_steps < 1):
            raise ConfigError(
                f"checkpoints: keep {keep} must be at least 2, every_n_steps {every_n_steps} positive or null,"
                f" mode {mode!r} max or min."
            )
        self.folder = Path(folder or "checkpoints")
        self.every_n_steps, self.keep, self.monitor, self.mode = every_n_steps, keep, monitor, mode
        self.best_value, self.best_step, self.saved_step = -math.inf, -1, -1
        self.first: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A relative folder is one of the run."""
        self.folder = Path(trainer.default_root_dir) / self.folder

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every so many steps and at the end.

        The end is saved here and not when the loops have ended: only inside them does Lightning's state say where
        exactly to go on, and averaged weights (EMA) have not replaced the trained ones yet.
        """
        step, every = trainer.global_step, self.every_n_steps
        if step != self.saved_step and (_ends(trainer) or (every and step and step % every == 0)):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, and move ``best`` if the value rose."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not isinstance(pl_module, DenseModule):
            return
        value = self.value({k: float(v) for k, v in trainer.callback_metrics.items()}, pl_module)
        better = value > self.best_value or self.best_step < 0
        if better:
            self.best_value, self.best_step = value, trainer.global_step
        self._save(trainer)  # also where the step is saved: the file has to know this validation
        if better and trainer.is_global_zero:
            link(self.folder / "best.ckpt", f"step-{trainer.global_step}.ckpt")
            self._prune()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end if something else than the step count ended the run; ``best`` is the last without validation."""
        if trainer.global_step != self.saved_step:
            self._save(trainer)
        if self.best_step < 0 and trainer.is_global_zero:
            link(self.folder / "best.ckpt", f"step-{trainer.global_step}.ckpt")

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
        for key in module.model.tasks:
            score = module.model.task(key).score
            now = metrics.get(f"val/{key}/{score.metric}", math.nan)
            if math.isfinite(now):
                first = self.first.setdefault(key, now)
                changes.append((now - first) / max(abs(first), 1e-12) * (1 if score.higher_is_better else -1))
        return sum(changes) / len(changes) if changes else -math.inf

    def _save(self, trainer: pl.Trainer) -> None:
        file = self.folder / f"step-{trainer.global_step}.ckpt"
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(file, False)  # everything, not weights alone; every rank: it is a collective
        if not trainer.is_global_zero:
            return
        link(self.folder / "last.ckpt", file.name)
        self._prune()

    def _prune(self) -> None:
        # files of later steps are there after going on from an older one; they are replaced when their step comes
        files = [file for file in self.folder.glob("step-*.ckpt") if _step(file) <= self.saved_step]
        best = self.folder / "best.ckpt"
        target = best.resolve().name if best.exists() else ""
        for file in sorted(files, key=_step)[: -self.keep]:
            if file.name != target:
                file.unlink()

    def state_dict(self) -> dict[str, Any]:
        """What ``best`` means so far."""
        state = {"best_value": self.best_value, "best_step": self.best_step, "saved_step": self.saved_step}
        return {**state, "first": dict(self.first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]
        self.saved_step, self.first = state_dict["saved_step"], dict(state_dict["first"])


def _ends(trainer: pl.Trainer) -> bool:
    """Whether the batch that ends now is the run's last."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return bool(trainer.should_stop or (last_epoch and trainer.is_last_batch))


def _step(file: Path) -> int:
    return int(file.stem.partition("-")[2])


def link(path: Path, target: str) -> None:
    """Point a relative symbolic link at a file of the same folder, atomically."""
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
