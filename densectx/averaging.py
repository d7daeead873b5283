"""Averages of weights: one that leaves frozen weights alone, and what they mean for the numbers of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, final

import torch
from pytorch_lightning import callbacks
from torch import Tensor

_CLASS: Final = "EMAWeightAveraging"
_DECAY: Final = 0.999  # Lightning's default
_MOST: Final = 0.2  # of a run that an average may cover
_GOOD: Final = 0.1


@final
class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Lightning's, but for numbers that do not change: their average is what they are, to the bit.

    Lightning's decay * average + (1 - decay) * weight rounds at every step, also where both are equal, so that frozen
    weights drift; what was kept for them (:mod:`densectx.feature_cache`) is then not theirs. A config that names
    Lightning's class gets this one.

    Args:
        device: of the averages; null for that of the model.
        use_buffers: whether buffers are averaged too.
        decay: weight of the average at each update.
        update_every_n_steps: optimizer steps from one update to the next.
        update_starting_at_step: the first step with one; null for the first of all.
        update_starting_at_epoch: the first epoch with an update at its end; null for none.
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
        # past the constructor between, which chooses the function itself
        callbacks.WeightAveraging.__init__(self, device, use_buffers, avg_fn=_unless_equal(decay))
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch


def _unless_equal(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """(average, weight, updates so far) -> the next average: torch's ``get_ema_avg_fn``, but for equal numbers."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        blended = decay * averaged + (1 - decay) * current
        return torch.where(averaged == current, averaged, blended.to(averaged.dtype))

    return average


def exact(spec: Any) -> Any:
    """A callback of a config, Lightning's exponential average exchanged for :class:`EMAWeightAveraging`."""
    own = f"{EMAWeightAveraging.__module__}.{_CLASS}"
    path = spec.get("class_path") if isinstance(spec, Mapping) else spec
    if path != _CLASS and not (str(path).startswith("pytorch_lightning.") and str(path).endswith(f".{_CLASS}")):
        return spec
    return {**spec, "class_path": own} if isinstance(spec, Mapping) else own


def lag(config: Mapping[str, Any]) -> str:
    """A warning where an exponential average covers so much of a run that its end comes too late; empty if not.

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
        covered = every / (1 - decay) if decay < 1 else steps
        if covered > _MOST * steps:
            short = max(1 - every / (_GOOD * steps), 0.0)
            return (
                f"trainer.callbacks: {_CLASS} with decay {decay:g} averages over about {covered:.0f} steps, and the run"
                f" has {steps}: what is validated and saved lags behind what is trained. Decay {short:.3g} covers a"
                " tenth of the run."
            )
    return ""
