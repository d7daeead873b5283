"""The run's ``metrics.csv`` and TensorBoard's events; a full disk ends the logging, not the training."""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable, Mapping
from os import SEEK_END
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from densectx.say import warn


@final
class MetricsFile(Logger):
    """One row a step with a column a metric, written at once, so that a killed run keeps what it measured.

    Unlike Lightning's CSV logger it goes on in the file of a resumed run: rows of steps that are done again are
    replaced, the others stay.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.rows: dict[int, dict[str, str]] | None = None  # read when the first value comes
        self.columns = ["step"]
        self.start = 0  # of the last row in the file
        self.failed = False  # the file system refused the last values: the whole file is written when it takes them

    @property
    def name(self) -> str:
        """Nothing: the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Nothing."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        step = step or 0
        opened = self.rows is None
        if self.rows is None:
            # a run that was left in a validation begins with it: the step that it belongs to is not done again
            repeated = any(name.startswith("val/") for name in metrics)
            self.rows = self._read(step + repeated)
        fresh = [name for name in metrics if name not in self.columns and name != "step"]
        self.columns += fresh
        last = next(reversed(self.rows), None)
        self.rows.setdefault(step, {"step": str(step)}).update({k: f"{v:.9g}" for k, v in metrics.items()})
        # opened: rows of steps done again are still in the file
        whole = opened or self.failed or bool(fresh) or last is None or step < last
        try:
            self._write() if whole else self._append(step, last)
            self.failed = False
        except OSError as error:
            if not self.failed:
                warn(not_logged(self.path, error))
            self.failed = True

    def _append(self, step: int, last: int | None) -> None:
        """The row of a step that is the last one or comes after it."""
        with self.path.open("r+", newline="", encoding="utf-8") as file:
            if step == last:  # more values of the last row: it is written again
                file.seek(self.start)
                file.truncate()
            else:
                self.start = file.seek(0, SEEK_END)
            csv.DictWriter(file, self.columns).writerow((self.rows or {})[step])

    def _read(self, before: int) -> dict[int, dict[str, str]]:
        """What an earlier part of the run measured before this step."""
        if not self.path.exists():
            return {}
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()  # the end of a machine may leave half a row, or zeros
        reader = csv.DictReader(lines)
        found = [row for row in reader if _whole(row)]
        if len(found) < len(lines) - 1 or not text.endswith("\n"):
            warn(f"{self.path}: damaged rows are left out: the process that wrote them ended in the middle.")
        self.columns = list(reader.fieldnames or self.columns)
        return {int(row["step"]): row for row in found if int(row["step"]) < before}

    def _write(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        try:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                for row in (self.rows or {}).values():
                    self.start = file.tell()
                    writer.writerow(row)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _whole(row: Mapping[str | None, Any]) -> bool:
    step = row.get("step")
    return isinstance(step, str) and step.isdecimal() and None not in row and None not in row.values()


@final
class StepsOfLogs(pl.Callback):
    """What a resumed run logs goes on at its step.

    Lightning counts from one step too low where the checkpoint is that of a validation whose turn had not come by the
    number of batches: at the end of ``max_time``, or with an interval of time.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before anything is logged."""
        loop = trainer.fit_loop.epoch_loop  # no public number says where logs are
        loop._batches_that_stepped = max(loop._batches_that_stepped, trainer.global_step)


@final
class TensorBoard(TensorBoardLogger):
    """Lightning's, in the run folder itself; what the file system does not take is left out, with one warning.

    Args:
        folder: for the event files.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, name="", version="")
        self.writer: Tolerant | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of TensorBoard, for everything that it can draw."""
        if self.writer is None:
            self.writer = Tolerant(Path(self.save_dir), lambda: super(TensorBoard, self).experiment)
        return self.writer

    @rank_zero_only
    def save(self) -> None:
        """Nothing but a flush: the hyper-parameters are in config.yaml."""
        self.experiment.flush()


@final
class Tolerant:
    """Passes calls on to an object until the file system refuses one; then it warns, once, and does nothing more.

    Args:
        path: what the object writes, for the warning.
        make: gives the object.
    """

    def __init__(self, path: Path, make: Callable[[], Any]) -> None:
        self._path, self._make = path, make
        self._object: Any = None
        self._failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Tolerant:
        return self  # Lightning copies a module with all that hangs on it; the files are still the same

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The method of the object."""
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            if self._failed:
                return None
            try:
                if self._object is None:
                    self._object = self._make()
                return getattr(self._object, name)(*arguments, **options)
            except OSError as error:
                self._failed = True
                warn(not_logged(self._path, error))

        return call


def not_logged(path: Path, error: OSError) -> str:
    """The warning."""
    return f"{path}: cannot be written: {error.strerror or error}; training goes on without what is logged there."


def quiet_writers() -> None:
    """No traceback from the threads of TensorBoard: what stops them reaches :class:`Tolerant` as well."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = hook
