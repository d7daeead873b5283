"""What is inspected: a trained model, a named one, or the model of a config, which needs no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch

from densectx.checkpoint import load
from densectx.config import Composed, compose
from densectx.data.module import DataModule
from densectx.errors import ConfigError
from densectx.inspection.shell import shell_of
from densectx.known_keys import check_known_keys
from densectx.model import MODEL_KEYS, DenseModel, without_weights
from densectx.model_names import Named, is_model_name, named
from densectx.types import SourceInfo


@final
@dataclass(frozen=True)
class Subject:
    """A model to inspect.

    Attributes:
        name: as it was given.
        kind: ``"weights"`` of a file or run, ``"config"`` of a name or YAML file with fresh weights.
        shell: the model on the meta device.
        real: makes it with weights, in evaluation mode.
    """

    name: str
    kind: str
    shell: DenseModel
    real: Callable[[], DenseModel]


def subject_of(name: str, more: Sequence[str] = ()) -> Subject:
    """Find what is meant.

    Args:
        name: checkpoint, run folder, ``.safetensors`` file, name of ``densectx list models``, or a YAML config.
        more: YAML files that are merged after the config.

    Raises:
        ConfigError: a config that cannot be read or built, ``more`` behind something else.
        CheckpointError, PluginError: as :func:`densectx.checkpoint.load`.
    """
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return _of_config(name, compose([name, *more]))
    if more:
        raise ConfigError(f"-c {more[0]}: files are merged after a config, and {name!r} is none (.yaml).")
    if not Path(name).exists() and is_model_name(name) and not (found := named(name)).has_weights:
        return _fresh(name, found.config, found.sources)
    model = load(name)
    return Subject(name, "weights", cast("DenseModel", shell_of(model).module), lambda: model)


def _of_config(name: str, composed: Composed) -> Subject:
    check_known_keys(composed)
    model, data = composed.values.get("model"), composed.values.get("data")
    if not isinstance(model, Mapping):
        raise ConfigError(f"{name}: has no model to inspect; expected model.backbone, model.tasks and so on.")
    sources = dict(composed.base.sources) if isinstance(composed.base, Named) else {}
    if isinstance(data, Mapping) and data.get("sources"):
        sources |= DataModule(data["sources"], num_workers=0).info()
    return _fresh(name, {key: value for key, value in model.items() if key in MODEL_KEYS}, sources)


def _fresh(name: str, config: Mapping[str, Any], sources: Mapping[str, SourceInfo]) -> Subject:
    def real() -> DenseModel:
        with torch.random.fork_rng(devices=[]):  # the same fresh weights at each call
            torch.manual_seed(0)
            return DenseModel.from_config(without_weights(config), sources).eval()

    try:
        with torch.device("meta"):
            shell = real()
    except (NotImplementedError, RuntimeError):  # a part that computes with its numbers while it is built
        shell = cast("DenseModel", shell_of(real()).module)
    return Subject(name, "config", shell, real)
