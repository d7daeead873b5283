"""What a run leaves to look at: pictures, and the table of metrics beside their trivial answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import save_image

from densectx.errors import ConfigError
from densectx.loggers import not_logged
from densectx.module import DenseModule
from densectx.say import warn
from densectx.types import Batch


@final
class Pictures(pl.Callback):
    """One sheet a task after every validation: ``folder/<task>/step-N.png``, and in TensorBoard.

    Args:
        folder: where, relative to the run folder.
        rows: samples a sheet, at least 1.

    Raises:
        ConfigError: no rows.
    """

    def __init__(self, folder: str = "pictures", rows: int = 4) -> None:
        super().__init__()
        if rows < 1:
            raise ConfigError(f"Pictures: rows {rows} is not positive.")
        self.folder, self.rows = Path(folder), rows
        self.sheets: dict[str, list[list[Tensor]]] = {}
        self.failed = False  # said once

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A relative folder is one of the run."""
        self.folder = Path(trainer.default_root_dir) / self.folder

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first samples' pictures."""
        if not trainer.is_global_zero or trainer.sanity_checking or not isinstance(pl_module, DenseModule):
            return
        for key, (prediction, x, target) in outputs.items():
            rows = self.sheets.setdefault(key, [])
            for i in range(min(len(x), self.rows - len(rows))):
                one = {name: value[i : i + 1] for name, value in target.items()}
                drawn = pl_module.model.task(key).draw(prediction[i : i + 1], x[i : i + 1], one)
                rows.append([picture.detach().float().cpu() for picture in drawn])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the sheets."""
        for key, rows in self.sheets.items():
            picture = sheet(rows)
            try:
                (self.folder / key).mkdir(parents=True, exist_ok=True)
                save_image(picture, self.folder / key / f"step-{trainer.global_step}.png")
            except OSError as error:  # a full disk ends no training for a picture
                if not self.failed:
                    warn(not_logged(self.folder, error))
                self.failed = True
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"val/{key}", picture, trainer.global_step)
        self.sheets = {}


def sheet(rows: Sequence[Sequence[Tensor]], gap: int = 4) -> Tensor:
    """Pictures (3, H, W) of any sizes in rows and columns on white: (3, H', W')."""
    columns = max(map(len, rows))
    widths = [max(row[c].shape[2] for row in rows if c < len(row)) for c in range(columns)]
    lines = []
    for row in rows:
        height = max(picture.shape[1] for picture in row)
        padded = [
            F.pad(p, (0, w - p.shape[2] + gap, 0, height - p.shape[1] + gap), value=1.0)
            for p, w in zip(row, widths, strict=False)
        ]
        line = torch.cat(padded, 2)
        lines.append(F.pad(line, (0, sum(widths) + gap * columns - line.shape[2], 0, 0), value=1.0))
    return torch.cat(lines, 1)[:, : -gap or None, : -gap or None]


@final
class ScoreTable(pl.Callback):
    """Prints each task's metric beside its trivial answer when a fit, validation or test ends."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Of the last validation, which may be some steps ago."""
        self._print(trainer, pl_module, "val")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Of a validation on its own."""
        self.values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        if trainer.state.fn == "validate":
            self._print(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Of a test."""
        self.values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self._print(trainer, pl_module, "test")

    def _print(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and isinstance(module, DenseModule):
            sys.stdout.write(score_table(module, self.values, stage))
            sys.stdout.flush()


def score_table(module: DenseModule, metrics: Mapping[str, float], stage: str = "val") -> str:
    """The table as text: one row a task that was evaluated; above it how it is measured and what a mean leaves out."""
    rows = [("task", "metric", "value", "trivial answer", "its value")]
    notes = []
    for key in module.model.tasks:
        task = module.model.task(key)
        score = task.score
        value = metrics.get(f"{stage}/{key}/{score.metric}")
        other = metrics.get(f"{stage}/{key}/{score.metric}_{score.baseline}")
        if value is None:
            continue
        rows.append((key, score.metric, number(value), score.baseline, "-" if other is None else number(other)))
        if task.convention:
            notes.append(f"{key}: {score.metric} by {task.convention}")
        if absent := absent_classes(metrics, f"{stage}/{key}"):
            notes.append(f"{key}: neither in truth nor in prediction, so left out of the mean: {', '.join(absent)}")
    if len(rows) == 1:
        return ""
    widths = [max(len(row[c]) for row in rows) for c in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n" + "\n".join([*notes, *lines]) + "\n"


def number(value: float) -> str:
    """Two decimals, or four digits where those would say less: 29.50, 0.1771."""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"


def absent_classes(metrics: Mapping[str, float], prefix: str) -> list[str]:
    """The classes, as in the keys ``<prefix>/iou_<class>``, that have no IoU; none if no class has one."""
    start = f"{prefix}/iou_"
    values = {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}
    absent = [name for name, value in values.items() if math.isnan(value)]
    return absent if len(absent) < len(values) else []
