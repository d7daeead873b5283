"""How the processes of a run share it: every one of them holds all weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any, Final, final

import torch
from pytorch_lightning import strategies
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry
from pytorch_lightning.strategies.xla import XLAStrategy
from torch.distributed import is_torchelastic_launched

from densectx.classpaths import named
from densectx.errors import ConfigError, unknown
from densectx.resilience.timeouts import collective_timeout

_DDP: Final[Mapping[str, dict[str, Any]]] = {
    "ddp": {},
    "ddp_find_unused_parameters_false": {},
    "ddp_find_unused_parameters_true": {"find_unused_parameters": True},
}
_KEY: Final = "trainer.strategy"
_NAMES: Final = ("auto", "single_device", *_DDP)


@final
class Replicated(DDPStrategy):
    """Lightning's DDP, where a batch stays where the data module put it.

    Lightning names its GPU to DDP, which then moves whole batches there, and what is read as numbers must be read back
    (:meth:`densectx.data.module.DataModule.transfer_batch_to_device`).

    Args:
        timeout: that a collective may take; default: DENSECTX_TIMEOUT, and on machines with GPUs a minute more, since
            NCCL ends a process without a word: the watchdog must have said by then who is lost.
        kwargs: other arguments of Lightning's, and of ``DistributedDataParallel``.
    """

    def __init__(self, timeout: timedelta | None = None, **kwargs: Any) -> None:
        usual = timedelta(seconds=collective_timeout() + (60 if torch.cuda.is_available() else 0))
        super().__init__(timeout=timeout or usual, **kwargs)

    def determine_ddp_device_ids(self) -> None:
        """None: DDP finds the device of the weights by itself, barriers that of the process group."""


def make_strategy(trainer: Mapping[str, Any]) -> Any:
    """What stands for the ``strategy`` of a config's ``trainer``: Lightning's DDP has other defaults than this one.

    Returns:
        A strategy where the config or, where it leaves that open, the number of processes asks for DDP; a class node
        that names Lightning's with this one's name; else what the config has, None where that is nothing.
    """
    strategy = trainer.get("strategy")
    if isinstance(strategy, Mapping):
        is_ddp = _class_of(strategy, ("pytorch_lightning",)) is DDPStrategy
        return {**strategy, "class_path": f"{__name__}.{Replicated.__name__}"} if is_ddp else strategy
    options = ddp_options(trainer)
    return strategy if options is None else Replicated(**options)


def ddp_options(trainer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of DDP where the config or, where it leaves that open, the number of processes asks for it; else None."""
    strategy, devices = trainer.get("strategy") or "auto", trainer.get("devices") or "auto"
    if strategy != "auto":
        return _DDP.get(str(strategy).lower())
    if "," in str(devices) and not isinstance(devices, list):
        devices = [name for name in str(devices).split(",") if name.strip()]
    here = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 0
    if devices in ("auto", -1, "-1") and trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda"):
        here = torch.cuda.device_count()
    several = here > 1 or (trainer.get("num_nodes") or 1) > 1 or is_torchelastic_launched()
    return _DDP["ddp"] if several else None


def check_strategy(strategy: Any, allowed: Collection[str]) -> None:
    """Refuse strategies that split a model, or that copy a run that has begun.

    Args:
        strategy: of a config's ``trainer``.
        allowed: packages whose classes it may name.

    Raises:
        ConfigError: such a strategy; it is named, and what to take instead.
    """
    name = strategy.get("class_path") if isinstance(strategy, Mapping) else strategy or "auto"
    if any(word in str(strategy) for word in ("spawn", "fork", "ddp_notebook")):
        raise ConfigError(
            f"{strategy!r} would copy a run that has begun into other processes; take ddp, which starts them anew.",
            _KEY,
        )
    if isinstance(strategy, Mapping):
        cls = _class_of(strategy, allowed)  # None: jsonargparse says what is wrong
        whole = isinstance(cls, type) and issubclass(cls, DDPStrategy | SingleDeviceStrategy)
        fine = cls is None or (whole and not issubclass(cls, DeepSpeedStrategy | XLAStrategy))
    else:
        fine = str(name).lower() in _NAMES
        if not fine and name not in StrategyRegistry:
            raise ConfigError(unknown("strategy", str(name), _NAMES), _KEY)
    if not fine:
        raise ConfigError(
            f"{name!r} is not possible: every process holds all weights here, which are compared between processes and"
            f" written as one file. Take one of {', '.join(_NAMES)}, or a subclass of DDPStrategy or"
            " SingleDeviceStrategy.",
            _KEY,
        )


def _class_of(node: Mapping[str, Any], allowed: Collection[str]) -> Any:
    """The class that a node names, by its name alone if it is Lightning's; None where there is none."""
    path = str(node.get("class_path"))
    return named(path, allowed, f"{_KEY}.class_path") if "." in path else getattr(strategies, path, None)
