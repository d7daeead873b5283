"""Averages of weights: one that leaves frozen weights alone, and what they mean for the numbers of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, Final, final

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks
from torch import Tensor, nn

from densectx.errors import ConfigError

_CLASS: Final = "EMAWeightAveraging"
_DECAY: Final = 0.999  # Lightning's default
_MOST: Final = 0.2  # of a run that an average may cover
_GOOD: Final = 0.1


@final
class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Lightning's, but for numbers that do not change: their average is what they are, to the bit.

    Lightning's decay * average + (1 - decay) * weight rounds at every step, also where both are equal, so that frozen
    weights drift; what was kept for them (:mod:`densectx.feature_cache`) is then not theirs. Until its first update
    the average is the weights as they are, not as they were when the run began. A config that names Lightning's class
    gets this one.

    Args:
        device: of the averages; null for that of the model.
        use_buffers: whether buffers are averaged too.
        decay: weight of the average at each update, in [0, 1).
        update_every_n_steps: optimizer steps from one update to the next, at least 1.
        update_starting_at_step: the first step with one; null for the first of all.
        update_starting_at_epoch: the first epoch with an update at its end; null for none.

    Raises:
        ConfigError: a decay or a number of steps out of range.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = _DECAY,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"{_CLASS}: decay {decay} is not in [0, 1).", "trainer.callbacks")
        if update_every_n_steps < 1:
            raise ConfigError(
                f"{_CLASS}: update_every_n_steps {update_every_n_steps} is not 1 or more.", "trainer.callbacks"
            )
        # past the constructor between, which chooses the function itself
        callbacks.WeightAveraging.__init__(self, device, use_buffers, avg_fn=_unless_equal(decay))
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average where the model will be; it is moved there later, and Lightning asks where it is now."""
        self._device = self._device or trainer.strategy.root_device  # set by the constructor only, which is too early
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The average is validated."""
        self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The average is the file's ``state_dict``, and the weights its ``current_model_state``."""
        self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The average is left as the weights."""
        self._follow(pl_module)
        super().on_train_end(trainer, pl_module)

    @torch.no_grad()
    def _follow(self, pl_module: pl.LightningModule) -> None:
        """Before the first update: the average is the weights and buffers as they are."""
        average = self._average_model
        if average is not None and average.n_averaged == 0:
            for own, now in zip(_tensors(average.module), _tensors(pl_module), strict=True):
                own.copy_(now)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _unless_equal(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """(average, weight, updates so far) -> the next average: torch's ``get_ema_avg_fn``, but for equal numbers."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        blended = decay * averaged + (1 - decay) * current
        return torch.where(averaged == current, averaged, blended.to(averaged.dtype))

    return average


def exact(spec: Any) -> Any:
    """A callback of a config, Lightning's exponential average exchanged for :class:`EMAWeightAveraging`.

    Raises:
        ConfigError: it is Lightning's average of a run's end.
    """
    own = f"{EMAWeightAveraging.__module__}.{_CLASS}"
    path = str(spec.get("class_path") if isinstance(spec, Mapping) else spec)
    name = path.rpartition(".")[2] if path.startswith("pytorch_lightning.") else path
    if name == "StochasticWeightAveraging":
        raise ConfigError(
            f"{name} makes its average after the last checkpoint is written, measures the statistics of frozen batch"
            f" norms anew and changes accumulate_grad_batches; take {_CLASS}.",
            "trainer.callbacks",
        )
    if name != _CLASS:
        return spec
    return {**spec, "class_path": own} if isinstance(spec, Mapping) else own


def lag(config: Mapping[str, Any]) -> str:
    """A warning where an exponential average covers too much of a run, or begins behind its end; empty if not.

    An average with decay d is about that of the last 1 / (1 - d) steps. What is validated and saved is the average, so
    where that is a large part of the run it still holds weights from before the learning rate fell, and a network that
    is good already looks bad.

    Args:
        config: of a run.
    """
    trainer = config.get("trainer") or {}
    steps = trainer.get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        return ""
    given = trainer.get("callbacks") or []
    for callback in given if isinstance(given, list) else [given]:
        spec = callback if isinstance(callback, Mapping) else {"class_path": callback}  # Lightning takes a name alone
        if not str(spec.get("class_path", "")).endswith(_CLASS):
            continue
        options = spec.get("init_args") or {}
        decay, every = options.get("decay", _DECAY), options.get("update_every_n_steps", 1)
        start = options.get("update_starting_at_step") or 0
        first = math.ceil(start / every) * every
        if first >= steps and options.get("update_starting_at_epoch") is None:
            return (
                f"trainer.callbacks: {_CLASS} has its first update at step {first}, and the run has {steps}: nothing is"
                " averaged."
            )
        covered = every / (1 - decay)
        if min(covered, steps - first) > _MOST * steps:  # nothing from before its first update is in it
            short = max(1 - every / (_GOOD * steps), 0.0)
            return (
                f"trainer.callbacks: {_CLASS} with decay {decay:g} averages over about {covered:.0f} steps, and the run"
                f" has {steps}: what is validated and saved lags behind what is trained. Decay {short:.3g} covers a"
                " tenth of the run."
            )
    return ""
