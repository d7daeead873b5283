"""Models by name, ``densectx list models``, as what a config starts from. Importing it imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, final

from densectx.distributions import how_to_install
from densectx.errors import ConfigError, DensectxError, PluginError
from densectx.imports import allowed_imports, reason
from densectx.registry import MODELS, TASKS
from densectx.types import SourceInfo

ZOO: Final = "densectx-zoo"
"""The distribution that trained models come with."""

ZOO_NAMES: Final = (
    "denoise-gray",
    "denoise-color",
    "sr-x2",
    "sr-x3",
    "sr-x4",
    "colorize",
    "segment-camvid",
    "multitask",
)
"""What its models are called; it may have only some of them yet."""


def where_to_get(name: str) -> str:
    """Of a model name that nothing provides: a sentence, after a space, if it is one of the zoo's; else empty."""
    if name not in ZOO_NAMES:
        return ""
    try:
        return f" {ZOO} {version(ZOO)} is installed and has no model {name!r} yet."
    except PackageNotFoundError:
        return f" {name!r} is a model name of {ZOO}: {how_to_install(ZOO)}."


def is_model_name(text: str) -> bool:
    """Whether a text, which may be a path too, names a model: its name alone, in full, or as ``package.module:Attr``.

    A name that several distributions provide is one: who uses it hears how to settle that.
    """
    if ":" in text:
        return text.partition(":")[0].partition(".")[0] in allowed_imports()
    try:
        MODELS.entry(text)
    except ConfigError:
        return False
    except PluginError:
        return True
    return True


def provided(name: str) -> Mapping[str, Any] | Path:
    """What the entry of a model gives: a config, or the file of its weights, which need not be there.

    Raises:
        ConfigError: unknown name.
        PluginError: its package cannot be used, its entry fails, or gives something else.
    """
    entry = MODELS.get(name)
    origin = "" if ":" in name else f" of {MODELS.entry(name).origin}"
    try:
        given = entry()
    except DensectxError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"model {name!r}{origin}: {reason(error)}") from error
    if isinstance(given, Mapping):
        return given
    if isinstance(given, str | os.PathLike):
        return Path(given)
    raise PluginError(f"model {name!r}{origin} gives neither a model config nor a file, but {given!r}.")


@final
@dataclass(frozen=True)
class Named:
    """A model of the registry.

    Attributes:
        name: as it was given.
        config: its ``model`` part, in plain types: backbone, projection, context, tasks and so on.
        sources: what its tasks' data sources are.
        has_weights: whether ``init_from`` and ``load`` take the name.
    """

    name: str
    config: dict[str, Any]
    sources: dict[str, SourceInfo]
    has_weights: bool


def named(name: object) -> Named:
    """The model of a name; one that is a file gives what its header says.

    Raises:
        ConfigError: no name, or an unknown one, with the nearest known.
        CheckpointError: the file cannot be read.
        PluginError: its package cannot be used, its entry fails, or gives neither a config nor a file.
    """
    if not isinstance(name, str):
        raise ConfigError(f"expected a name of `densectx list models`, got {name!r}.")
    if "${" in name:
        raise ConfigError(f"{name!r} is not known before the files are merged; write the name itself.")
    try:
        found = provided(name)
    except ConfigError as error:
        raise ConfigError(error.message + where_to_get(name), error.path) from None
    if has_weights := isinstance(found, Path):
        from densectx.checkpoint import read  # needs torch, which a config alone does not

        given = read(found)[1].get("model")
    else:
        given = found
    if not isinstance(given, Mapping) or "backbone" not in given:
        raise PluginError(f"model {name!r} gives neither a model config nor a file that has one; repair its package.")
    config = {str(key): value for key, value in given.items() if key != "sources"}
    config["tasks"] = {key: task for key, task in config.get("tasks", {}).items() if task is not None}
    sources = {key: SourceInfo.from_config(info) for key, info in given.get("sources", {}).items()}
    return Named(name, config, sources, has_weights)


def check_classes(base: Named, config: Mapping[str, Any], sources: Mapping[str, SourceInfo]) -> None:
    """Refuse data whose classes are not those of the model that a config starts from.

    ``classes: N`` of a task says that other classes are meant. Tasks without that option do not learn classes, so that
    those of their sources may differ.

    Args:
        base: the model.
        config: the composed ``model`` part.
        sources: of the data.

    Raises:
        ConfigError: a task has other classes than the model's, in number, name or order; both are named. An unknown
            task.
    """
    for key, task in (config.get("tasks") or {}).items():
        old = base.config["tasks"].get(key)
        if not isinstance(old, Mapping) or not isinstance(task, Mapping):
            continue
        source = str(task.get("source"))
        if source not in sources or old.get("source") not in base.sources:
            continue
        theirs, ours = base.sources[old["source"]].classes, sources[source].classes
        if theirs == ours or task.get("classes") == len(ours) != old.get("classes"):
            continue
        if "classes" not in TASKS.options(str(task.get("name"))):
            continue
        raise ConfigError(
            f"model {base.name!r} has {_said(theirs)}, but source {source!r} has {_said(ours)}. Bring the source's into"
            " the model's order (classes, remap), or, to learn other classes from the start, say so with"
            f" model.tasks.{key}.classes: {len(ours)}.",
            f"model.tasks.{key}",
        )


def _said(classes: tuple[str, ...]) -> str:
    shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
    return f"{len(classes)} classes ({shown})" if classes else "no classes"
