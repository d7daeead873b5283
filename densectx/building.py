"""From a composed config to trainer, module and data, by LightningCLI."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, final, get_type_hints

import pytorch_lightning as pl
from jsonargparse import set_parsing_settings
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.strategies import Strategy

from densectx.averaging import exact
from densectx.callbacks import Pictures, ScoreTable
from densectx.checkpoint_io import AtomicCheckpointIO
from densectx.checkpointing import Checkpoints
from densectx.data.module import DataModule
from densectx.errors import ConfigError
from densectx.limits import tell_time
from densectx.loggers import MetricsFile, StepsOfLogs, TensorBoard, quiet_writers
from densectx.model import DenseModel
from densectx.model_names import Named, check_classes
from densectx.module import DenseModule
from densectx.registry import allowed_imports
from densectx.resilience.guards import FiniteGuard
from densectx.resilience.preemption import Preemption
from densectx.resilience.replicas import Replicas
from densectx.resilience.watchdog import Watchdog
from densectx.strategies import check_strategy, make_strategy
from densectx.trainer_checks import avoid_mps, check_balancing, check_clock, check_trainer
from densectx.turning import check_turns
from densectx.typecheck import describe, fits
from densectx.types import SourceInfo

# Classes that a config may name by class_path: what is built from there runs, so the list is closed.
_PACKAGES = ("torch.optim", "timm.optim", "pytorch_lightning", "lightning_fabric", "densectx", "datetime")


def allowed_packages() -> list[str]:
    """Packages whose classes a config may name by class_path."""
    return [*_PACKAGES, *allowed_imports()]


def build_module(
    sources: dict[str, SourceInfo],
    backbone: Any,
    tasks: dict[str, Any],
    optimizer: OptimizerCallable,
    projection: Any = "default",
    context: Any = "basic",
    norm: str = "batch",
    ablate: str | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
    balancing: Any = "fixed",
    freeze: list[str] | None = None,
    cache_features: str | None = None,
    param_groups: list[dict[str, Any]] | None = None,
    channels_last: bool = False,
    compile: bool = False,  # noqa: A002 - the name users know
    seed: int = 0,
) -> DenseModule:
    """The module of a config's ``model`` part.

    Args:
        sources: from ``data``.
        backbone: spec, see ``densectx list backbones``.
        tasks: {key: spec}, see ``densectx list tasks``.
        optimizer: class_path and init_args.
        projection: {channels: 128, activation: relu | none, std: null}, or null for none.
        context: spec, see ``densectx list contexts``; ``share: false`` gives every task its own.
        norm: batch, group, none, frozen or per_input (a copy for each kind of input): what the trunk's batch norms
            become.
        ablate: trunk_zero feeds the heads zeros instead of features.
        lr_scheduler: class_path and init_args, stepped every optimizer step.
        balancing: method, see ``densectx list balancing``, or {name: gradnorm, alpha: 1.5}; each takes ``watch: true``
            (measure how the gradients of tasks agree) and ``of: weights | features`` (what these are taken of) too.
        freeze: names of modules that are not trained.
        cache_features: folder where the features of a frozen backbone and projection are kept.
        param_groups: list of {match: pattern on parameter names, lr: ...}; the first that matches counts.
        channels_last: memory format.
        compile: torch.compile in place.
        seed: of counted randomness; from seed_everything.
    """
    config = {"backbone": backbone, "context": context, "tasks": tasks, "norm": norm, "ablate": ablate}
    if projection != "default":
        config["projection"] = projection
    return DenseModule(
        DenseModel.from_config(config, sources),
        optimizer,
        lr_scheduler,
        balancing=balancing or "fixed",
        seed=seed,
        freeze=freeze or (),
        cache_features=cache_features,
        param_groups=param_groups or (),
        channels_last=channels_last,
        compile=compile,
    )


@final
class _CLI(LightningCLI):
    """Instantiates data first: the model learns classes, palette and channels from it.

    Args:
        extra: built arguments of the trainer, which no config can hold.
        base: the named model that the config starts from; data with other classes is refused.
    """

    def __init__(self, extra: dict[str, Any], base: Named | None, *args: Any, **kwargs: Any) -> None:
        self._extra, self._base = extra, base
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """The composed config is all there is; ``sys.argv`` was read before."""
        self.config = parser.parse_object(args)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """With the built arguments."""
        given = self.config_init["trainer"].get("plugins") or []
        plugins = [*(given if isinstance(given, list) else [given]), AtomicCheckpointIO()]
        return super().instantiate_trainer(plugins=plugins, **self._extra, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data", "model.sources", compute_fn=self._sources, apply_on="instantiate")

    def _sources(self, data: DataModule) -> dict[str, SourceInfo]:
        if self._base is not None:
            check_classes(self._base, self.config["model"], data.info())
        return data.info()


def _after_validation(spec: Any) -> Any:
    """A callback of a config; an ``EarlyStopping`` on what validations measure looks at it right after one.

    Lightning's default where an epoch ends with its validation is after the epoch: its file is written by then and
    does not know that the run ends, and a run that goes on from it has no metric to look at.
    """
    path = str(spec.get("class_path")) if isinstance(spec, Mapping) else ""
    if path != "EarlyStopping" and not (path.startswith("pytorch_lightning.") and path.endswith(".EarlyStopping")):
        return spec
    options = spec.get("init_args") or {}
    given = options.get("check_on_train_epoch_end") is not None
    if given or not str(options.get("monitor", "")).startswith("val/"):
        return spec
    return {**spec, "init_args": {**options, "check_on_train_epoch_end": False}}


def _check_types(part: str, values: Mapping[str, Any], build: Callable[..., Any]) -> None:
    """Refuse values of a part of the config that do not fit the signature of what is built of it."""
    hints = get_type_hints(build)
    for key, value in values.items():
        if not fits(value, hint := hints.get(key, Any)):
            raise ConfigError(f"expected {describe(hint)}, got {value!r}.", f"{part}.{key}")


def _listed(kind: type[pl.Callback], given: Sequence[str]) -> bool:
    """Whether the config lists a callback of that class itself; jsonargparse takes the class's name alone too."""
    return any(path.rpartition(".")[2] == kind.__name__ for path in given)


def instantiate(
    config: Mapping[str, Any], folder: Path, command: str, base: Named | None = None
) -> tuple[pl.Trainer, DenseModule, DataModule]:
    """Build data, model and trainer by LightningCLI; nothing reads data yet.

    Args:
        config: composed.
        folder: of the run.
        command: ``fit``, ``validate`` or ``test``.
        base: the named model that the config starts from.
    """
    values = {key: deepcopy(config.get(key) or {}) for key in ("model", "data", "trainer")}
    seed = config.get("seed_everything", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed_everything: expected an integer, got {seed!r}.")
    _check_types("model", values["model"], build_module)
    _check_types("data", values["data"], DataModule.__init__)
    values["model"]["seed"] = values["data"]["seed"] = seed
    values["trainer"].setdefault("use_distributed_sampler", False)  # ours counts every sample once
    values["trainer"].setdefault("num_sanity_val_steps", 0)
    values["trainer"]["default_root_dir"] = str(folder)
    callbacks: list[pl.Callback] = [Watchdog(), ScoreTable()]
    check_trainer(values["trainer"])
    check_strategy(values["trainer"].get("strategy"), allowed_packages())
    avoid_mps(values["trainer"])
    listed = values["trainer"].get("callbacks") or []
    listed = [_after_validation(exact(spec)) for spec in (listed if isinstance(listed, list) else [listed])]
    if listed:
        values["trainer"]["callbacks"] = listed
    given = [str(spec.get("class_path") if isinstance(spec, Mapping) else spec) for spec in listed]
    loggers: list[Any] = []
    if command == "fit" and values["trainer"].get("logger", True) not in (False, None):
        quiet_writers()
        loggers = [TensorBoard(folder), MetricsFile(folder / "metrics.csv")]
        callbacks += [StepsOfLogs(), LearningRateMonitor("step")]
    if command == "fit":
        if not _listed(Pictures, given):
            callbacks.append(Pictures())
        if values["trainer"].get("enable_checkpointing", True) and not _listed(Checkpoints, given):
            callbacks.append(Checkpoints())
        callbacks += [kind() for kind in (Replicas, FiniteGuard) if not _listed(kind, given)]
    if not _listed(Preemption, given):
        callbacks.append(Preemption())  # after averages of weights, which the config lists
    extra: dict[str, Any] = {}
    for key in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval"):
        if isinstance(values["trainer"].get(key), int):  # jsonargparse would make 1 batch 1.0, all of them
            extra[key] = values["trainer"].pop(key)
    if values["trainer"].get("logger", True) is True:
        values["trainer"].pop("logger", None)
        extra["logger"] = loggers or False
    strategy = make_strategy(values["trainer"])
    if isinstance(strategy, Strategy):
        values["trainer"].pop("strategy", None)
        extra["strategy"] = strategy
    elif strategy is not None:
        values["trainer"]["strategy"] = strategy
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed_packages())
    # every refusal of jsonargparse is raised instead of printed with fifty lines of usage
    parser = {"exit_on_error": False}
    try:
        cli = _CLI(
            extra,
            base,
            build_module,
            DataModule,
            save_config_callback=None,
            seed_everything_default=seed,
            trainer_defaults={"callbacks": callbacks},
            parser_kwargs=parser,
            args={**values, "seed_everything": seed},
            run=False,
            auto_configure_optimizers=False,
        )
    except (ArgumentError, TypeError, ValueError, MisconfigurationException) as error:
        if isinstance(error.__cause__, ConfigError):  # of _sources
            raise error.__cause__ from None
        raise ConfigError(" ".join(str(error).split())) from error
    if command == "fit":
        check_clock(values["trainer"].get("val_check_interval"), cli.trainer.world_size)
        check_balancing(values["model"].get("balancing"), cli.model, cli.datamodule)
        check_turns(cli.model.model, cli.datamodule)
        made = cli.model.configure_optimizers()  # what it refuses is refused before data is read
        if isinstance(made, dict):
            tell_time(made["lr_scheduler"]["scheduler"], cli.trainer)  # needs a limit
    cli.model.config = deepcopy(dict(config))
    return cli.trainer, cli.model, cli.datamodule
