"""Learning-rate schedules with warm-up, a step at a time; any scheduler of torch works as well."""

from __future__ import annotations

import math
from typing import final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from densectx.errors import ConfigError


@final
class WarmupPoly(LambdaLR):
    """Linear warm-up, then (1 - progress)^power (Chen et al. 2017).

    Args:
        optimizer: given by the trainer.
        total_steps: optimizer steps until the rate is 0.
        warmup_steps: steps of the linear rise.
        power: 0.9 as usual, 0 or more.

    Raises:
        ConfigError: a rate that would rise without end or be negative.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, power: float = 0.9) -> None:
        _check(total_steps, warmup_steps)
        if not 0 <= power < math.inf:
            raise ConfigError(f"lr_scheduler: power {power} is not a number from 0 up.")
        super().__init__(optimizer, lambda step: _rise(step, warmup_steps) * (1 - _gone(step, total_steps)) ** power)


@final
class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to ``final`` of the rate (Loshchilov & Hutter 2017).

    Args:
        optimizer: given by the trainer.
        total_steps: optimizer steps until the end.
        warmup_steps: steps of the linear rise.
        final: fraction of the rate at the end, in [0, 1].

    Raises:
        ConfigError: a rate that would be negative, or rise.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> None:
        _check(total_steps, warmup_steps)
        if not 0 <= final <= 1:
            raise ConfigError(f"lr_scheduler: final {final} is not a fraction in [0, 1].")

        def factor(step: int) -> float:
            cosine = (1 + math.cos(math.pi * _gone(step, total_steps))) / 2
            return _rise(step, warmup_steps) * (final + (1 - final) * cosine)

        super().__init__(optimizer, factor)


def _check(total: int, warmup: int) -> None:
    if total < 1 or not 0 <= warmup <= total:
        raise ConfigError(
            f"lr_scheduler: total_steps {total} and warmup_steps {warmup}: expected 0 <= warm-up <= total."
        )


def _rise(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


def _gone(step: int, total: int) -> float:
    return min(1.0, step / total)
