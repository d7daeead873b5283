"""The data of a config for commands that look at them without training: the config is checked as ``fit`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from densectx.config import Composed, compose
from densectx.data.module import DataModule, read_here
from densectx.errors import ConfigError, unknown
from densectx.known_keys import check_known_keys


def data_of_config(
    files: Sequence[str], flags: Sequence[tuple[str, str]], does: str
) -> tuple[Mapping[str, Any], DataModule]:
    """Compose a config and build its data, which reads no file.

    Args:
        files: of the config.
        flags: (dotted key path, YAML text).
        does: subject and verb of the command, as ``"lint looks at"``.

    Returns:
        ``data`` of the config, and what it describes.

    Raises:
        ConfigError: it cannot be read, has no data or a key that ``fit`` refuses, or a task is of no source.
    """
    composed = compose(files, flags, check_known_keys)
    check_known_keys(composed)
    options = composed.values.get("data")
    if not isinstance(options, Mapping):
        raise ConfigError(f"{files[0]}: has no data; {does} data.sources.")
    data = read_here(options)
    _check_tasks(composed, options["sources"])
    return options, data


def _check_tasks(composed: Composed, sources: Mapping[str, Any]) -> None:
    """What a task lacks beside its source is told by ``fit``, which builds it."""
    model = composed.values.get("model")
    tasks = model.get("tasks") if isinstance(model, Mapping) else None
    for key, spec in tasks.items() if isinstance(tasks, Mapping) else ():
        source = spec.get("source") if isinstance(spec, Mapping) else None
        if source is not None and str(source) not in sources:
            where = f"model.tasks.{key}.source"
            raise ConfigError(f"{unknown('source', str(source), sources)} ({composed.where(where)})", where)
