"""Optimizer and schedule of a config, over groups of parameters by pattern."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from densectx.errors import ConfigError, suggest, unknown

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
        if option not in ("match", *optimizer.defaults):
            raise ConfigError(unknown("optimizer option", option, optimizer.defaults), "model.param_groups")
        if type(optimizer.defaults.get(option)) in (int, float) and type(value) not in (int, float):
            raise ConfigError(f"{option}: expected a number, got {value!r}.", "model.param_groups")
        # torch looks at those of the optimizer alone; some are negative by nature, as Adafactor's beta2_decay
        negative = type(optimizer.defaults.get(option)) in (int, float) and optimizer.defaults[option] < 0
        if type(value) in (int, float) and not (math.isfinite(value) and (negative or value >= 0)):
            expected = "finite number" if negative else "number from 0 up"
            raise ConfigError(f"{option}: expected a {expected}, got {value!r}.", "model.param_groups")


def make_scheduler(make: MakeScheduler, optimizer: Optimizer) -> LRScheduler:
    """The schedule of an optimizer, stepped with it.

    Raises:
        ConfigError: it does not take its options, or needs a metric.
    """
    try:
        scheduler = make(optimizer)
    except ConfigError as error:
        raise error.within("model") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error), "model.lr_scheduler") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError("schedules step with the optimizer and see no metric; take another.", "model.lr_scheduler")
    return scheduler
