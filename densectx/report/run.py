"""What is left of a run: config, checkpoint, measurements; each as far as it is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

from densectx.checkpoint import from_header, load_weights, locate, read
from densectx.config import check_keys, load_yaml
from densectx.data.module import DATA_KEYS, DataModule, read_here
from densectx.errors import ConfigError, DensectxError
from densectx.model import DenseModel
from densectx.report.history import History, read_history

T = TypeVar("T")


@final
@dataclass
class Run:
    """A run folder as it was found.

    Attributes:
        folder: of the run.
        checkpoint: the file whose model is looked at, None without one.
        config: of the experiment, empty if it cannot be read.
        info: the checkpoint's header.
        model: in evaluation mode, None if it cannot be had.
        data: None if it cannot be had.
        history: what was measured while it ran.
        missing: what could not be had, and why.
    """

    folder: Path
    checkpoint: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    model: DenseModel | None = None
    data: DataModule | None = None
    history: History = field(default_factory=lambda: History({}, {}))
    missing: list[DensectxError] = field(default_factory=list)

    @property
    def name(self) -> str:
        """``quickstart / 0``."""
        folder = Path(os.path.abspath(self.folder))
        return f"{folder.parent.name} / {folder.name}"

    @property
    def step(self) -> int | None:
        """Optimizer steps behind the checkpoint, as its name says."""
        if self.checkpoint is None:
            return None
        digits = self.checkpoint.resolve().stem.rpartition("-")[2]
        return int(digits) if digits.isdecimal() else None

    def attempt(self, action: Callable[[], T]) -> T | None:
        """What an action returns; None where it refuses, which is remembered."""
        try:
            return action()
        except DensectxError as error:
            self.missing.append(error)
            return None


def open_run(path: str | Path) -> Run:
    """Read what is there of a run.

    Args:
        path: its folder, or a checkpoint in its folder ``checkpoints``.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent.parent
    if not path.exists() or not any((folder / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints")):
        raise ConfigError(
            f"report {path}: {'is' if path.exists() else 'there is'} no run folder; name one that densectx fit made,"
            " such as runs/quickstart/0, or a checkpoint in it."
        )
    run = Run(folder)
    run.history = run.attempt(lambda: read_history(folder / "metrics.csv")) or run.history
    run.checkpoint = run.attempt(lambda: locate(path))
    found = None if run.checkpoint is None else run.attempt(lambda: read(path))
    weights, run.info = found or ({}, {})
    run.config = run.attempt(lambda: _config(folder, run.info)) or {}
    if found:
        run.model = run.attempt(lambda: _model(run.info, weights, str(run.checkpoint)))
    if run.config:
        run.data = run.attempt(lambda: _data(run.config))
    return run


def _config(folder: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    file = folder / "config.yaml"
    if file.exists():
        return load_yaml(file)
    config = info.get("config")
    if not isinstance(config, dict) or not config:
        raise ConfigError(f"{file}: there is none, and the checkpoint does not have the config.")
    return config


def _model(info: Mapping[str, Any], weights: dict[str, Any], path: str) -> DenseModel:
    model = from_header(info, path, weights)
    load_weights(model, weights, path)
    return model.eval()


def _data(config: Mapping[str, Any]) -> DataModule:
    given = config.get("data")
    if not isinstance(given, Mapping):
        raise ConfigError("config.yaml: has no data.")
    check_keys(given, DATA_KEYS, "data")
    seed = config.get("seed_everything", 0)
    return read_here(given, seed if isinstance(seed, int) else 0)


class File(NamedTuple):
    """A checkpoint file: its name, the links that lead to it, bytes, and when it was written."""

    name: str
    links: tuple[str, ...]
    size: int
    written: str


def checkpoints(folder: Path) -> list[File]:
    """The checkpoints of a run, oldest step first."""
    below = folder / "checkpoints"
    files = [file for file in below.glob("*.ckpt") if file.exists()]
    links: dict[Path, list[str]] = {}
    for file in files:
        if file.is_symlink():
            links.setdefault(file.resolve(), []).append(file.stem)
    found = []
    for file in sorted((f for f in files if not f.is_symlink()), key=lambda f: (len(f.stem), f.stem)):
        status = file.stat()
        time = datetime.fromtimestamp(status.st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
        found.append(File(file.name, tuple(sorted(links.get(file.resolve(), []))), status.st_size, time))
    return found
