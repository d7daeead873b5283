"""Accumulation windows: their batches are prepared together, so that weights can be counted before the first output."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import pytorch_lightning as pl
import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.normalising import Normaliser, Window
from densectx.tasks.base import Target
from densectx.types import Batch, Windowed


@final
class Prepared(NamedTuple):
    """Inputs and targets of the tasks that a batch has data for; the surroundings in inputs that have some."""

    inputs: dict[str, Tensor]
    targets: dict[str, Target]
    surround: dict[str, int]


@final
class Accumulation:
    """The window that the run is in; without accumulation nothing happens here.

    All batches of a window are moved to the device and prepared when it begins, and let go one by one; what the step
    itself is given stays on the CPU.

    Args:
        normaliser: counts.
        prepare: of a batch on the device.
    """

    def __init__(self, normaliser: Normaliser, prepare: Callable[[Batch], Prepared]) -> None:
        self._normaliser, self._prepare = normaliser, prepare
        self._batches: list[Batch] | None = None
        self._prepared: list[Prepared | None] = []
        self._window: Window | None = None

    def open(
        self, batch: Batch, device: torch.device, trainer: pl.Trainer | None
    ) -> tuple[Prepared, Window | None, int]:
        """What a training step needs: inputs and targets, the batch's window if it has one, its index there."""
        if trainer is None or trainer.accumulate_grad_batches == 1:
            return self._prepare(batch), None, 0
        loader = trainer.train_dataloader
        place = loader.place if isinstance(loader, Windowed) else None
        if place is None:
            return self._prepare(batch), None, 0
        if place.window is not self._batches:
            self._batches = place.window
            prepared = [self._moved(one, trainer) for one in place.window]
            self._prepared = list(prepared)
            divisor = trainer.accumulate_grad_batches
            self._window = self._normaliser.window([one.targets for one in prepared], divisor, device)
        found = self._prepared[place.at]
        self._prepared[place.at] = None
        return found or self._moved(batch, trainer), self._window, place.at

    def _moved(self, batch: Batch, trainer: pl.Trainer) -> Prepared:
        # a copy, since the data module leaves the batches of a window themselves where they are
        return self._prepare(trainer.strategy.batch_to_device(dict(batch)))


def check_validation(trainer: pl.Trainer) -> None:
    """Refuse validations inside a window: checkpoints are written there and could not be resumed exactly.

    Raises:
        ConfigError: with the first batch after which one would be.
    """
    size, every, epoch = trainer.accumulate_grad_batches, trainer.val_check_batch, trainer.num_training_batches
    if not trainer.enable_validation or size == 1 or every is None or every == float("inf") or epoch == float("inf"):
        return
    every, epoch = int(every), int(epoch)
    if trainer.check_val_every_n_epoch is not None:
        wrong = next((at for at in range(every, epoch, every) if at % size), None)
    else:
        steps_of_epoch = -(-epoch // size)
        ends = [epoch * trainer.max_epochs] if trainer.max_epochs not in (None, -1) else []
        if trainer.max_steps > 0:
            whole, rest = divmod(trainer.max_steps, steps_of_epoch)
            ends.append(whole * epoch + rest * size)
        last = min(ends, default=every * epoch * size)
        wrong = next((at for at in range(every, last + 1, every) if at % epoch % size), None)
    if wrong is not None:
        raise ConfigError(
            f"there would be a validation after batch {wrong}, inside a window of accumulate_grad_batches {size}"
            f" (epochs have {epoch} batches): checkpoints written there could not be resumed exactly. Take multiples of"
            f" {size} batches for both.",
            "trainer.val_check_interval",
        )
