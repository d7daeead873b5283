"""Learning-rate schedules with warm-up, by steps or by time; any scheduler of torch works as well."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from densectx.errors import ConfigError


def ends_early(config: Mapping[str, Any]) -> str:
    """A warning where the rate is 0 for the rest of a run before its end; empty if not.

    That of a run that goes on with a later end, too: what ``total_steps: ${trainer.max_steps}`` stood for when it began
    is a number of its config.

    Args:
        config: of a run.
    """
    steps = (config.get("trainer") or {}).get("max_steps")
    schedule = (config.get("model") or {}).get("lr_scheduler")
    if not isinstance(schedule, Mapping) or not isinstance(steps, int):
        return ""
    module, _, name = str(schedule.get("class_path")).rpartition(".")
    options = schedule.get("init_args") or {}
    total = options.get("total_steps")
    # a cosine may end above 0, and power 0 does not fall
    falls = {"WarmupPoly": options.get("power", 1) != 0, "WarmupCosine": not options.get("final")}
    own = module in ("", __name__) and falls.get(name, False)
    if not own or not isinstance(total, int) or not 0 < total < steps:
        return ""
    return (
        f"model.lr_scheduler: total_steps {total} is before trainer.max_steps {steps}: the last {steps - total} steps"
        " train at rate 0. Set model.lr_scheduler.init_args.total_steps too; a run that goes on takes that with"
        " --allow-changed model.lr_scheduler."
    )


class Warmup(LambdaLR, ABC):
    """Linear warm-up, then a fall with the part of the run that is gone: of its steps or its time, whichever is more.

    Attributes:
        timed: whether the time counts.
        time_gone: the part of ``trainer.max_time`` that is gone, from 0 to 1; the training sets it, the same on all
            ranks, where ``timed`` is set.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None,
        warmup_steps: int,
        timed: bool,
        fall: Callable[[float], float],
    ) -> None:
        if timed and total_steps == -1:  # trainer.max_steps without a limit
            total_steps = None
        if total_steps is None and not timed:
            raise ConfigError(
                "total_steps is missing; name them, or take timed: true and trainer.max_time.", "lr_scheduler"
            )
        if warmup_steps < 0 or (total_steps is not None and not max(1, warmup_steps) <= total_steps):
            raise ConfigError(
                f"total_steps {total_steps} and warmup_steps {warmup_steps}: expected 0 <= warm-up <= total.",
                "lr_scheduler",
            )
        self.timed = timed
        self.time_gone = 0.0

        def factor(step: int) -> float:
            gone = max(self.time_gone, step / total_steps if total_steps else 0.0)
            return min(1.0, (step + 1) / (warmup_steps + 1)) * fall(min(1.0, gone))

        super().__init__(optimizer, factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What was reached; whether the time counts is said by who goes on."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "timed"})


@final
class WarmupPoly(Warmup):
    """Linear warm-up, then (1 - progress)^power (Chen et al. 2017).

    Args:
        optimizer: given by the trainer.
        total_steps: optimizer steps until the rate is 0; may be left out, or -1, with ``timed``.
        warmup_steps: steps of the linear rise.
        power: 0.9 as usual, 0 or more.
        timed: the rate is 0 at the end of ``trainer.max_time`` too, however many steps that allows: a budget of time on
            any machine (Li et al. 2020, "Budgeted Training"). Such a run cannot be repeated bit for bit.

    Raises:
        ConfigError: a rate that would rise without end or be negative; no ``total_steps`` and not ``timed``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        power: float = 0.9,
        timed: bool = False,
    ) -> None:
        if not 0 <= power < math.inf:
            raise ConfigError(f"power {power} is not a number from 0 up.", "lr_scheduler")
        super().__init__(optimizer, total_steps, warmup_steps, timed, lambda gone: (1 - gone) ** power)


@final
class WarmupCosine(Warmup):
    """Linear warm-up, then half a cosine down to ``final`` of the rate (Loshchilov & Hutter 2017).

    Args:
        optimizer: given by the trainer.
        total_steps: optimizer steps until the end; may be left out, or -1, with ``timed``.
        warmup_steps: steps of the linear rise.
        final: fraction of the rate at the end, in [0, 1].
        timed: see :class:`WarmupPoly`.

    Raises:
        ConfigError: a rate that would be negative, or rise; no ``total_steps`` and not ``timed``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        final: float = 0.0,
        timed: bool = False,
    ) -> None:
        if not 0 <= final <= 1:
            raise ConfigError(f"final {final} is not a fraction in [0, 1].", "lr_scheduler")

        def fall(gone: float) -> float:
            return final + (1 - final) * (1 + math.cos(math.pi * gone)) / 2

        super().__init__(optimizer, total_steps, warmup_steps, timed, fall)
