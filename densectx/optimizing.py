"""Optimizer and schedule of a config, over groups of parameters by pattern."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Final

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from densectx.errors import ConfigError, suggest, unknown

_LONGER: Final = (
    "set its total_steps to those of the run, which a run that goes on takes with --allow-changed model.lr_scheduler."
)

MakeOptimizer = Callable[[Any], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


def by_pattern(groups: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The groups of ``param_groups`` by what they are for, in their order.

    Raises:
        ConfigError: one does not say what it is for, or says the same as another.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        if (name := _pattern(group)) in found:
            raise ConfigError(f"two groups match {name!r}; make them one.", "model.param_groups")
        found[name] = dict(group)
    return found


def _pattern(group: Any) -> str:
    """What a group of ``param_groups`` is for.

    Raises:
        ConfigError: it does not say.
    """
    found = group.get("match") if isinstance(group, Mapping) else None
    if not isinstance(found, str):
        others = [str(key) for key in group if key != "match"] if isinstance(group, Mapping) else []
        near = next((end for key in others if (end := suggest(key, ["match"])) != "."), ".")
        raise ConfigError(f"expected {{match: pattern, lr: ...}}, got {group!r}{near}", "model.param_groups")
    return found


def make_optimizer(
    make: MakeOptimizer, named: Sequence[tuple[str, nn.Parameter]], param_groups: Mapping[str, Mapping[str, Any]]
) -> Optimizer:
    """The optimizer over trained parameters.

    Args:
        make: parameter groups -> optimizer.
        named: trained parameters by name.
        param_groups: {pattern on names: options of the optimizer}; the first that matches counts.

    Raises:
        ConfigError: nothing is trained, a pattern matches nothing, an option that the optimizer does not have.
    """
    if not named:
        raise ConfigError("model.freeze: nothing is left to train.")
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault(next((p for p in param_groups if fnmatchcase(name, p)), ""), []).append(parameter)
    for one in param_groups:
        if one not in groups:
            raise ConfigError(
                f"model.param_groups: pattern {one!r} matches no trained parameter (first match wins);"
                f" names look like {named[0][0]!r}."
            )
    own = {p: {k: v for k, v in group.items() if k != "match"} for p, group in param_groups.items()}
    try:
        optimizer = make([{"params": ps, **own.get(p, {})} for p, ps in groups.items()])
    except ConfigError as error:
        raise error.within("model") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error), "model.optimizer") from error
    for group in param_groups.values():
        _check_options(group, optimizer)
    return optimizer


def _check_options(group: Mapping[str, Any], optimizer: Optimizer) -> None:
    for option, value in group.items():
        if option == "match":
            continue
        if option not in optimizer.defaults:
            raise ConfigError(unknown("optimizer option", option, optimizer.defaults), "model.param_groups")
        if expected := _expected(option, value, optimizer.defaults[option]):
            raise ConfigError(f"{option}: expected {expected}, got {value!r}.", "model.param_groups")


def _expected(option: str, value: Any, usual: Any) -> str:
    """What an option of a group has to be, empty if it is: torch looks at those of the optimizer alone."""
    if isinstance(usual, tuple | list):
        several = isinstance(value, tuple | list) and len(value) == len(usual)
        if several and all(_is_one(option, *pair) for pair in zip(value, usual, strict=True)):
            return ""
        return f"{len(usual)} {'numbers in [0, 1)' if option == 'betas' else 'finite numbers'}"
    number = type(value) in (int, float)
    if type(usual) in (int, float) and not number:
        return "a number"
    negative = type(usual) in (int, float) and usual < 0  # some are by nature, as Adafactor's beta2_decay
    if number and not (math.isfinite(value) and (negative or value >= 0)):
        return "a finite number" if negative else "a number from 0 up"
    return ""


def _is_one(option: str, value: Any, usual: Any) -> bool:
    """Whether a value may be one of an option's several."""
    if type(value) not in (int, float):
        return value is None and usual is None
    return 0 <= value < 1 if option == "betas" else math.isfinite(value)


def make_scheduler(make: MakeScheduler, optimizer: Optimizer) -> LRScheduler:
    """The schedule of an optimizer, stepped with it.

    Raises:
        ConfigError: it does not take its options, needs a metric, or gives groups of other rates the same one.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        scheduler = make(optimizer)
    except ConfigError as error:
        raise error.within("model") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error), "model.lr_scheduler") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError("schedules step with the optimizer and see no metric; take another.", "model.lr_scheduler")
    starts = {group.get("initial_lr", rate) for group, rate in zip(optimizer.param_groups, rates, strict=True)}
    if len(set(rates)) > 1 and len(starts) == 1:
        raise ConfigError(
            f"model.param_groups gives rates {rates}, and {type(scheduler).__name__} one of its own to all; give max_lr"
            " (and base_lr) as a list, in this order.",
            "model.lr_scheduler",
        )
    return scheduler


@contextmanager
def stepping(scheduler: object) -> Iterator[None]:
    """Steps of a schedule inside.

    Raises:
        ConfigError: one is behind its end and it takes none there, as OneCycleLR does.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{type(scheduler).__name__}: {error}; {_LONGER}", "model.lr_scheduler") from error


def check_end(scheduler: object, trainer: pl.Trainer) -> None:
    """Refuse at its start a run that :func:`stepping` would end.

    Raises:
        ConfigError: the schedule is over before the run, as far as the end of that is known in steps.
    """
    if not isinstance(scheduler, OneCycleLR):
        return
    if scheduler.total_steps < (steps := trainer.estimated_stepping_batches) < math.inf:
        raise ConfigError(
            f"OneCycleLR ends after {scheduler.total_steps} steps, and the run after {steps}; {_LONGER}",
            "model.lr_scheduler",
        )
