"""How much of ``trainer.max_time`` is gone."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Timer

from densectx.errors import ConfigError
from densectx.schedules import Warmup


def time_gone(trainer: pl.Trainer) -> float | None:
    """The part of the time that a run may take which is gone, 0..1, by the clock of the first rank.

    All ranks call it. The time of the run's earlier parts counts, as in Lightning's ``Timer``.

    Returns:
        None without ``trainer.max_time`` (or a ``Timer`` with a duration).
    """
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    for timer in callbacks:
        if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None:
            gone = timer.time_elapsed()
            return trainer.strategy.broadcast(1.0 if left <= 0 else gone / (gone + left))
    return None


def tell_time(schedule: object, trainer: pl.Trainer) -> None:
    """Tell a schedule by time how much of it is gone, the same on all ranks; others are left alone.

    Raises:
        ConfigError: the run has no limit of time.
    """
    if isinstance(schedule, Warmup) and schedule.timed:
        if (gone := time_gone(trainer)) is None:
            raise ConfigError("timed: true needs trainer.max_time.", "model.lr_scheduler")
        schedule.time_gone = gone
