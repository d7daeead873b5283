"""What averages of weights mean for the numbers of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_CLASS: Final = "EMAWeightAveraging"
_DECAY: Final = 0.999  # Lightning's default
_MOST: Final = 0.2  # of a run that an average may cover
_GOOD: Final = 0.1


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
