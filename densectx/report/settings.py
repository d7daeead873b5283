"""The config of a run: what it sets, beside what would have held without."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, final

import pytorch_lightning as pl
import torch

from densectx.config import dump
from densectx.data.module import DataModule
from densectx.data.transforms import Augment
from densectx.errors import DensectxError
from densectx.nn.projection import PROJECTION
from densectx.registry import BACKBONES, CONTEXTS, DATASETS, HEADS, LOSSES, TASKS, Registry
from densectx.report.formats import plain
from densectx.report.markup import Html, tag
from densectx.report.page import Section, note, scrolled

ABSENT: Final = object()
"""In the place of a default where there is none, or none is known."""

MODEL: Final[Mapping[str, Any]] = {
    "context": "basic",
    "norm": "batch",
    "ablate": None,
    "lr_scheduler": None,
    "balancing": "fixed",
    "freeze": None,
    "cache_features": None,
    "param_groups": None,
    "channels_last": False,
    "compile": False,
}
"""What holds for the keys of ``model`` that a config does not have."""

_PARTS: Final[Mapping[str, Registry[Any]]] = {
    "model.backbone": BACKBONES,
    "model.context": CONTEXTS,
    "model.tasks.*": TASKS,
    "model.tasks.*.head": HEADS,
    "model.tasks.*.loss": LOSSES,
    "data.sources.*": DATASETS,
}
_CHOSEN: Final = ("model.tasks", "data.sources")  # whose keys the user names


@final
class Setting(NamedTuple):
    """A key that differs from its default; the default is ``ABSENT`` where there is none to differ from."""

    key: str
    value: Any
    default: Any


def settings(config: Mapping[str, Any]) -> tuple[list[Setting], int]:
    """(the keys that differ from their defaults, how many are equal to them)."""
    found = [*_walk(config, "", "", {"seed_everything": 0, "init_from": None, "requires": []})]
    differing = [one for one in found if one.default is ABSENT or not _same(one.value, one.default)]
    return differing, len(found) - len(differing)


def section(config: Mapping[str, Any]) -> Section:
    """The differences as a table, and the whole config below."""
    differing, equal = settings(config)
    head = [tag("th", name, scope="col") for name in ("key", "value", "default")]
    rows = []
    for one in differing:
        default = note_of(one.default)
        cells = [
            tag("th", tag("code", one.key), scope="row"),
            tag("td", tag("code", plain(one.value))),
            tag("td", default),
        ]
        rows.append(tag("tr", cells))
    table = tag("table", tag("thead", tag("tr", head)), tag("tbody", rows), class_="settings")
    said = f" {equal} more key{'s are' if equal != 1 else ' is'} set to what holds anyway." if equal else ""
    return Section(
        "config",
        "Config",
        [
            note(
                "What the config sets, and what would hold if it said nothing; a dash where there is no such thing.",
                said,
            ),
            scrolled(table, "Settings that differ from the defaults"),
            tag(
                "details", tag("summary", "The whole config"), scrolled(tag("pre", tag("code", dump(config))), "Config")
            ),
        ],
    )


def note_of(default: Any) -> Html:
    """A default, or a dash."""
    return tag("span", "\N{EN DASH}", class_="muted") if default is ABSENT else tag("code", plain(default))


def _walk(node: Any, path: str, pattern: str, defaults: Mapping[str, Any]) -> Iterator[Setting]:
    """The leaves below a mapping; ``pattern`` is the path with ``*`` for keys that the user names."""
    for key, value in node.items():
        below, kind = f"{path}.{key}".lstrip("."), f"{pattern}.{'*' if pattern in _CHOSEN else key}".lstrip(".")
        default = defaults.get(str(key), ABSENT)
        if kind in _PARTS:
            yield from _part(value, below, kind, _PARTS[kind], default)
        elif isinstance(value, Mapping) and value:
            yield from _walk(value, below, kind, _defaults(kind, value, default))
        else:
            yield Setting(below, value, default)


def _part(spec: Any, path: str, pattern: str, registry: Registry[Any], default: Any) -> Iterator[Setting]:
    """A part by name with its options; several are a list."""
    if isinstance(spec, list):
        for index, one in enumerate(spec):
            yield from _part(one, f"{path}[{index}]", pattern, registry, ABSENT)
        return
    if not isinstance(spec, Mapping):
        yield Setting(path, spec, default)
        return
    options = {key: value for key, value in spec.items() if key != "name"}
    if "name" in spec:
        yield Setting(f"{path}.name" if options else path, spec["name"], default)
    try:
        known = _signature(registry.get(str(spec.get("name"))))
    except DensectxError:  # of a package that is not here
        known = {}
    if pattern == "data.sources.*":
        known |= {"batch_size": 4, "eval_batch_size": 1, "augment": None}
    yield from _walk(options, path, pattern, known)


def _defaults(pattern: str, value: Mapping[str, Any], default: Any) -> Mapping[str, Any]:
    """What holds for the keys of a mapping."""
    fixed: dict[str, Mapping[str, Any]] = {"model": {**MODEL, "projection": PROJECTION}, "model.projection": PROJECTION}
    if pattern in fixed:
        return fixed[pattern]
    signatures = {
        "data": DataModule.__init__,
        "trainer": pl.Trainer.__init__,
        "data.sources.*.augment": Augment.__init__,
    }
    if pattern in signatures:
        return _signature(signatures[pattern])
    if str(value.get("class_path", "")).startswith("torch.optim."):
        made = _of_torch(str(value["class_path"]))
        return {"init_args": made}
    return default if isinstance(default, Mapping) else {}


def _of_torch(path: str) -> Mapping[str, Any]:
    """Defaults of a class of ``torch.optim``; nothing else that a config names is looked up."""
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name, None)
    return _signature(found) if isinstance(found, type) else {}


def _signature(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other)
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
