"""``densectx fit``, ``validate`` and ``test``: LightningCLI around a composed config."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from packaging.requirements import InvalidRequirement, Requirement
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException

from densectx.arguments import Arguments, Takes, split_arguments
from densectx.averaging import lag
from densectx.building import allowed_packages, instantiate
from densectx.checkpoint import init_from, load_weights, locate, read
from densectx.checkpoint_files import newest_run, temporary_of
from densectx.checkpointing import was_stopped
from densectx.classpaths import check_class_paths
from densectx.config import Composed, compose, dump
from densectx.data import fingerprint
from densectx.data.base import Split
from densectx.data.module import DataModule
from densectx.data.workers import innermost
from densectx.distributions import how_to_install
from densectx.errors import CheckpointError, ConfigError, DensectxError, PluginError, StorageError, suggest
from densectx.known_keys import check_known_keys, known_keys
from densectx.limits import time_gone
from densectx.module import DenseModule
from densectx.precision import emulated, native_precision
from densectx.registry import allow_import
from densectx.report.build import write_report
from densectx.report.environment import record
from densectx.resilience.failures import explained
from densectx.resilience.lock import NAME as LOCK
from densectx.resilience.lock import locked
from densectx.resilience.open_files import allow_open_files
from densectx.resilience.preemption import MARK, Preempted
from densectx.resilience.replicas import expect_data
from densectx.resilience.watchdog import expect_ranks, trained
from densectx.resuming import newest_whole, refuse_changes
from densectx.runs import first_rank, run_folder
from densectx.schedules import ends_early
from densectx.typecheck import describe, fits
from densectx.usage import help_text

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}
_REPORTED = 64  # samples of each source that the report of a fit looks at, or trainer.limit_val_batches if less
_CONFIG = "config.yaml"  # of a run, in its folder
_RATES = ("model.optimizer", "model.lr_scheduler", "model.param_groups")
_OPTIONS: dict[str, Takes] = {
    "--allow-changed": "values",
    "--allow-import": "values",
    "--ckpt_path": "value",
    "--debug": "nothing",
    "--name": "value",
    "--no-report": "nothing",
    "--print_config": "nothing",
    "--resume": "value",
}


def main(command: str, argv: Sequence[str]) -> int:
    """Run one of the three commands; returns the exit status.

    Raises:
        DensectxError: what the user can mend, see ``densectx.errors``.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(help_text(command))
        return 0
    arguments = split_arguments(argv, _OPTIONS)
    options = {key: values[-1] if values else "" for key, values in arguments.options.items()}
    for package in arguments.options.get("--allow-import", []):
        allow_import(package)
    _refuse_misplaced(command, options)
    files: list[str | Path] = list(arguments.files)
    run = _run_to_resume(options.get("--resume"), files, options.get("--name"), arguments.flags)
    if not files:
        own = _run_of(locate(options["--ckpt_path"])) if "--ckpt_path" in options else run
        files = [own / _CONFIG] if own is not None and (own / _CONFIG).exists() else []
    if not files:
        raise ConfigError(f"densectx {command} needs a config: -c FILE (see the configs folder of densectx).")
    composed = compose(files, arguments.flags, check_known_keys)
    config = composed.values
    _check_requires(config)
    _choose_precision(config)
    _check_parts(composed)
    if "--print_config" in options:
        sys.stdout.write(dump(config))
        return 0
    name = options.get("--name") or Path(files[0]).stem
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"--name {name}: a run lies inside the runs folder; trainer.default_root_dir sets that.")
    root = Path(config.get("trainer", {}).get("default_root_dir") or "runs")
    fresh = command == "fit" and run is None
    folder = run_folder(root, name) if fresh else run or root
    source = options.get("--resume") if command == "fit" else options.get("--ckpt_path")
    data: DataModule | None = None
    held = ExitStack()
    allow_open_files()
    try:
        if command == "fit":
            held.enter_context(locked(folder))
        trainer, module, data = instantiate(config, folder, command, composed.base)
        checkpoint = _checkpoint(command, source, run, config, module, arguments.options.get("--allow-changed", []))
        if command == "fit":
            if config.get("init_from") and checkpoint is None:
                rank_zero_info(init_from(module.model, config["init_from"]))
            listed = fingerprint.take(data.datasets) if checkpoint is None else _same_data(folder, data, arguments)
            expect_data(trainer, listed)
            if trainer.is_global_zero:
                _write_config(folder, dump(config))
                fingerprint.write(folder, listed)
                (folder / MARK).unlink(missing_ok=True)
                record(folder, trainer.strategy.root_device, trainer.world_size)
            rank_zero_info(f"Run folder: {folder}")
            counts = [one.samples for key, one in listed.items() if key.endswith(" val")]
            # a split that cannot be listed is not in there, and says so itself when it is read
            lacking = _lacking("val", counts) if len(counts) == len(data.datasets["val"]) else ""
            for said in (
                lag(config),
                ends_early(config),
                emulated(config, trainer.strategy.root_device.type),
                f"Nothing will be validated: {lacking}" if lacking and trainer.limit_val_batches else "",
            ):
                if said:
                    rank_zero_info(said)
            # what is logged is summed over ranks already
            warnings.filterwarnings("ignore", "It is recommended to use `self.log")
            expect_ranks(trainer)
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            if said := _nothing_trained(trainer):
                rank_zero_info(f"Nothing was trained: {said}.")
            elif trainer.is_global_zero:
                if trainer.enable_validation and not any(key.startswith("val/") for key in trainer.callback_metrics):
                    early = (
                        "the training ended before (trainer.val_check_interval, check_val_every_n_epoch);"
                        " densectx validate does it now."
                    )
                    rank_zero_info(f"Nothing was validated: {lacking or early}")
                if "--no-report" not in options:
                    _report(folder, trainer)
        else:
            if checkpoint:
                _load_measured(module, checkpoint)
            else:
                rank_zero_info(init_from(module.model, config["init_from"]))
            split: Split = "val" if command == "validate" else "test"
            if said := _lacking(split, map(len, data.datasets[split].values())):
                raise ConfigError(f"there is nothing to measure: {said}")
            expect_ranks(trainer)
            (trainer.validate if command == "validate" else trainer.test)(module, datamodule=data, verbose=False)
    except Preempted as left:
        if first_rank():
            sys.stderr.write(f"densectx: {left}\n")
        return left.status
    except SIGTERMException:  # before the handlers of this package were there
        sys.stderr.write("densectx: SIGTERM before the first step: nothing was saved.\n")
        return 143
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning shuts down, then exits with 1
            raise KeyboardInterrupt from error
        raise
    except OSError as error:
        if error.errno not in _STORAGE:
            if (known := explained(error, data)) is None:
                raise
            raise known from error
        raise StorageError(f"{error.filename or folder}: cannot be written: {error.strerror}; free space.") from error
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except ConfigError as error:
        raise ConfigError(_located(innermost(error), composed)) from error
    except DensectxError:
        raise
    except Exception as error:  # the death of a loader process may come wrapped in anything
        if (known := explained(error, data)) is None:
            raise
        raise known from error
    finally:
        held.close()
        if fresh and folder.exists() and not any(file.name != LOCK for file in folder.iterdir()):  # refused at once
            with suppress(OSError):  # another rank was faster; other runs of this name
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
                folder.parent.rmdir()
    return 0


def _write_config(folder: Path, text: str) -> None:
    """Keep the config in the folder of a run, whole or not at all: a resumed run needs the one that is there."""
    path, content = folder / _CONFIG, text.encode()
    if path.exists() and path.read_bytes() == content:
        return
    part = temporary_of(path)
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _lacking(split: Split, samples: Iterable[int]) -> str:
    """That no source has samples of a split, given how many each has; empty if one has."""
    fix = f"set data.sources.NAME.splits.{split} (for a manifest: give rows that split)"
    return "" if any(samples) else f"no source has a {split} split; {fix}."


def _load_measured(module: DenseModule, checkpoint: Path) -> None:
    """The weights to measure; where they do not fit, the refusal names the config that they were trained with."""
    weights, _ = read(checkpoint)
    try:
        load_weights(module.model, weights, str(checkpoint))
    except CheckpointError as error:
        run = _run_of(checkpoint)
        if run is None or not (run / _CONFIG).exists():
            raise
        fix = f"Measure with the config of its run, -c {run / _CONFIG}, and without flags that change the model."
        raise CheckpointError(f"{error}\n{fix}") from error


def _nothing_trained(trainer: pl.Trainer) -> str:
    """Why a fit that has ended did not train, empty if it did."""
    if trainer.limit_train_batches == 0:
        return "trainer.limit_train_batches is 0"
    if trained(trainer):
        return ""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return f"trainer.max_steps {trainer.max_steps} is reached already"
    if time_gone(trainer) == 1.0:
        return "the time of trainer.max_time is gone already"
    if was_stopped(trainer):
        return "a callback (EarlyStopping, say) ended it; with others and --allow-changed trainer.callbacks it goes on"
    return f"trainer.max_epochs {trainer.max_epochs} is reached already"


def _report(folder: Path, trainer: pl.Trainer) -> None:
    """The page of the run; the fit is done, so that whatever goes wrong here is only told. No rank waits for it."""
    if not (folder / "checkpoints").is_dir():  # checkpoints were switched off: nothing to look at
        return
    batches = trainer.limit_val_batches
    limit = max(1, min(_REPORTED, batches)) if isinstance(batches, int) else _REPORTED
    try:
        path, missing = write_report(folder, limit=limit, device=trainer.strategy.root_device)
    except Exception as error:
        sys.stderr.write(f"densectx: report: not written: {' '.join(f'{type(error).__name__}: {error}'.split())}\n")
        return
    for left_out in missing:
        sys.stderr.write(f"densectx: report: left out: {left_out}\n")
    rank_zero_info(f"Report: {path}")


def _refuse_misplaced(command: str, options: Mapping[str, str]) -> None:
    if command == "fit" and "--ckpt_path" in options:
        raise ConfigError("fit has no --ckpt_path: --resume goes on with a run, init_from: FILE only takes weights.")
    if command != "fit" and "--no-report" in options:
        raise ConfigError(f"{command} has no --no-report: it writes none; densectx report RUN does.")
    if command != "fit" and "--resume" in options:
        raise ConfigError(f"{command} has no --resume: name the weights with --ckpt_path FILE or RUN.")
    if command != "fit" and "--name" in options:
        raise ConfigError(f"{command} has no --name: it makes no run folder.")
    if "--allow-changed" in options and "--resume" not in options:
        raise ConfigError("--allow-changed is for a run that goes on: fit --resume RUN, FILE or auto.")


def _run_to_resume(
    resume: str | None, files: Sequence[str | Path], name: str | None, flags: Sequence[tuple[str, str]]
) -> Path | None:
    """The run folder that ``--resume`` goes on in; None for a fresh start. A name that is not that run's is refused."""
    if resume is None:
        return None
    if resume == "auto":
        if not files:
            raise ConfigError("--resume auto needs the config whose newest run is meant: -c FILE.")
        trainer = compose(files, flags).values.get("trainer") or {}
        found = newest_run(Path(trainer.get("default_root_dir") or "runs"), name or Path(files[0]).stem)
        rank_zero_info(f"--resume auto: going on in {found}" if found else "--resume auto: no run yet, a fresh start")
        return found
    if not os.path.exists(resume):
        near = suggest(resume, map(str, Path(resume).parent.glob("*")))
        raise CheckpointError(f"--resume {resume}: no such run folder or checkpoint{near}")
    file = locate(resume)
    run = _run_of(file)
    if run is None:
        raise ConfigError(
            f"--resume {resume}: {file} does not lie in the checkpoints folder of a run; name the run, or take its"
            " weights with init_from."
        )
    if name and run.absolute().parts[-1 - len(Path(name).parts) : -1] != Path(name).parts:
        raise ConfigError(f"--name {name}: --resume {resume} goes on in {run}, whatever its name; leave --name out.")
    return run


def _run_of(file: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None for a file that lies elsewhere."""
    return file.parent.parent if file.parent.name == "checkpoints" else None


def _check_requires(config: Mapping[str, Any]) -> None:
    needed = config.get("requires") or []
    if not fits(needed, list[str]):
        raise ConfigError(f"requires: expected a list of distributions, got {needed!r}.")
    for text in needed:
        fix = how_to_install(text)
        try:
            requirement = Requirement(text)
            found = version(requirement.name)
        except InvalidRequirement as error:
            raise ConfigError(f"requires: {text!r} is no requirement such as densectx-edges>=0.1: {error}.") from None
        except PackageNotFoundError:
            raise PluginError(f"the config needs {text}, which is not installed: {fix}") from None
        if not requirement.specifier.contains(found, prereleases=True):  # installed it is meant; so judges pip check
            raise PluginError(f"the config needs {text}, installed is {found}: {fix}")


def _choose_precision(config: Mapping[str, Any]) -> None:
    """What this machine is made for in the place of ``trainer.precision: auto``, so that the run's config has it."""
    trainer = config.get("trainer")
    if isinstance(trainer, dict) and trainer.get("precision") == "auto":
        trainer["precision"] = native_precision(str(trainer.get("accelerator", "auto")))
        rank_zero_info(f"trainer.precision: auto is {trainer['precision']} on this machine.")


def _check_parts(composed: Composed) -> None:
    """Shapes of the config and classes that it names, before anything is built."""
    check_known_keys(composed)
    config = composed.values
    for key in ("model", "data", "trainer"):
        part = config.get(key, {} if key == "trainer" else None)
        if not isinstance(part, Mapping):
            raise ConfigError(f"{key} ({composed.where(key)}): expected a mapping, got {part!r}.")
    for path in ("model.backbone", "model.tasks", "model.optimizer", "data.sources"):
        top, _, key = path.partition(".")
        if not config[top].get(key):
            raise ConfigError(f"{path} is missing; the configs folder of densectx has examples.")
    hints = get_type_hints(pl.Trainer.__init__)
    for key, value in (config.get("trainer") or {}).items():
        if not fits(value, hints[key]):  # here, so that what refers to the value is not blamed for it
            where = f"trainer.{key}"
            raise ConfigError(f"expected {describe(hints[key])}, got {value!r} ({composed.where(where)}).", where)
    for path in ("model.optimizer", "model.lr_scheduler", "trainer.callbacks", "trainer.strategy"):
        top, _, key = path.partition(".")
        check_class_paths(config.get(top, {}).get(key), path, allowed_packages(), composed)


def _checkpoint(
    command: str,
    source: str | None,
    run: Path | None,
    config: Mapping[str, Any],
    module: DenseModule,
    allowed: Sequence[str],
) -> Path | None:
    """The file to start from, checked against the config."""
    if command != "fit":
        if source is None and not config.get("init_from"):
            raise ConfigError(f"{command} needs weights: --ckpt_path FILE or RUN, or init_from in the config.")
        return None if source is None else locate(source)
    if source is None or run is None:
        return None
    file = newest_whole(run) if source == "auto" or Path(source).is_dir() else Path(source)
    weights, info = read(file)
    others = {"data", *(f"{part}.{key}" for part, keys in known_keys().items() for key in keys)}
    changed = refuse_changes(source, info["config"], config, allowed, others)
    module.schedules_anew = any(key.startswith(_RATES) for key in changed)
    load_weights(module.model, weights, f"--resume {source}: {file}")
    return file


def _same_data(folder: Path, data: DataModule, arguments: Arguments) -> fingerprint.Snapshot:
    """The data of a run that goes on, refused where they are not those that it began with."""
    allowed = "data" in arguments.options.get("--allow-changed", [])
    listed, said = fingerprint.compare(folder, data.datasets, allowed=allowed)
    if said:
        rank_zero_info(said)
    return listed


def _located(message: str, composed: Composed) -> str:
    """The message with the file or flag that its key path comes from."""
    match = re.match(r"(?:model|data|trainer)(?:\.[\w\[\]-]+)+", message)
    if match is None:
        return message
    below = [key for key in composed.origins if key.startswith(f"{match.group()}.")]
    for names in (re.findall(r"'([\w-]+)'", message), re.findall(r"\w+", message[match.end() :])):
        if named := [key for key in below if key.rpartition(".")[2] in names]:
            break
    origins = dict.fromkeys(composed.where(key) for key in named or [match.group(), *below])
    origin = "flag" if named and "flag" in origins else ", ".join(filter(None, origins))  # what was changed last
    return message if not origin or origin in message else f"{message} ({origin})"
