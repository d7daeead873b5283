"""Composing an experiment's config from YAML files and command-line flags."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias, final

from densectx.errors import ConfigError, suggest
from densectx.interpolation import resolve
from densectx.model_names import Named, named
from densectx.yamlfile import PLACEHOLDER, dump, load_yaml, parse_yaml

__all__ = ["COLLECTIONS", "Composed", "check_keys", "compose", "dump", "load_yaml"]

COLLECTIONS: Final = frozenset({"model.tasks", "data.sources"})
"""Mappings whose keys the user chooses: ``null`` removes an entry, and an entry called ``name`` is nothing special."""

Layer: TypeAlias = tuple[dict[str, Any], str]
"""A mapping to merge, and where it comes from."""

_FOREIGN: Final = "trainer."
"""What lies below is Lightning's, which knows no ``name``: ``max_time`` is a string or a mapping, never both."""

_ABSENT: Final = object()
_COMMENT: Final = re.compile(r"(?:^|\s)#")


@final
@dataclass
class Composed:
    """A composed config.

    Attributes:
        values: plain values, interpolations resolved.
        origins: dotted key path -> ``"file A.yaml"`` or ``"flag"``, for leaves and mappings.
        base: the named model that ``model`` starts from, None without ``model.name``.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    base: Named | None = None

    def where(self, path: str) -> str:
        """Where the value at a dotted key path, or else its nearest parent, comes from."""
        while path not in self.origins:
            parent = path[: max(path.rfind("."), path.rfind("["), 0)]
            if not path:
                return "config"
            path = parent
        return self.origins[path]


def compose(
    files: Sequence[str | Path],
    flags: Sequence[tuple[str, str]] = (),
    check: Callable[[Composed], None] | None = None,
) -> Composed:
    """Merge files in order, then all flags as one last layer, then resolve ``${...}``.

    Mappings merge deeply; lists and other values are replaced; a string meets a mapping as ``{name: string}``, but
    below ``trainer``, whose mappings are Lightning's, the later one replaces the other;
    a mapping whose ``name`` or ``class_path`` changes forgets what earlier layers gave it; ``null`` removes an
    entry of ``model.tasks`` and ``data.sources``. Flags may come in any order; of two values for one key the last wins.

    ``model.name`` names a model of ``densectx list models``: its config is what the files and flags are merged onto,
    and, if it has weights, ``init_from`` is its name unless something else is given. The result has no ``name`` any
    more: it says everything, so that a saved config means the same when the named model has changed.

    Args:
        files: YAML files.
        flags: (dotted key path, YAML text), e.g. ``("model.tasks.denoising.sigma", "50")``; one that begins with
            ``{subset}``, ``{class}`` or ``{scale}`` is a plain text.
        check: looks at the merged config before ``${...}`` is resolved: a misspelt key is its own error, not that of
            a reference to it.

    Raises:
        ConfigError: a file that :func:`load_yaml` refuses, a flag that is not YAML or contradicts another one, the
            removal of what is not there, an interpolation that cannot be resolved.
    """
    composed = Composed()
    layers: list[Layer] = [*((load_yaml(path), f"file {path}") for path in files), (_flag_layer(flags), "flag")]
    for layer, origin in layers:
        _refuse_nan(layer, "", origin)
    composed.base, layers = _onto_named(layers)
    for layer, origin in layers:
        _merge(composed, composed.values, layer, "", origin)
    if check is not None:
        check(composed)
    composed.values = _inline(resolve(composed.values, composed.where), composed.values, "")
    return composed


def _onto_named(layers: Sequence[Layer]) -> tuple[Named | None, list[Layer]]:
    """The model that the layers name, and the layers behind one that is its config.

    Another name forgets the ``model`` of the layers before, as everywhere.
    """
    found: Named | None = None
    name: Any = _ABSENT
    kept = [({**layer}, origin) for layer, origin in layers]
    for place, (layer, origin) in enumerate(kept):
        model = layer.get("model")
        if isinstance(model, str) and "${" not in model:
            model = {"name": model}
        if not isinstance(model, Mapping) or "name" not in model:
            continue
        if model["name"] != name:
            try:
                found = named(model["name"])
            except ConfigError as error:
                raise ConfigError(f"{error.message} ({origin})", "model.name") from None
            for earlier, _ in kept[:place] if name is not _ABSENT else ():
                earlier.pop("model", None)
            name = model["name"]
        layer["model"] = {key: value for key, value in model.items() if key != "name"}
    if found is None:
        return None, kept
    base: dict[str, Any] = {"model": found.config} | ({"init_from": found.name} if found.has_weights else {})
    return found, [(base, f"model {found.name}"), *kept]


def _refuse_nan(node: Any, path: str, origin: str) -> None:
    """No option takes it, every comparison lets it pass, and it poisons what it touches."""
    if isinstance(node, float) and node != node:  # true of NaN alone
        raise ConfigError(f"{path} ({origin}): expected a number, got .nan.")
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ():
        _refuse_nan(value, f"{path}[{key}]" if isinstance(node, list) else _join(path, str(key)), origin)


def check_keys(given: Mapping[str, Any], known: Iterable[str], path: str, composed: Composed | None = None) -> None:
    """Refuse keys that a mapping does not have.

    Args:
        given: the mapping.
        known: the keys it may have.
        path: its dotted key path, ``""`` for the root.
        composed: names the file or flag in the message.

    Raises:
        ConfigError: origin, full key path, nearest known key and all known keys are named.
    """
    names = sorted(known)
    for key in given:
        if key not in names:
            full = _join(path, key)
            origin = f" ({composed.where(full)})" if composed else ""
            raise ConfigError(f"unknown key {full!r}{origin}{suggest(key, names)} Known: {', '.join(names) or 'none'}.")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _merge(composed: Composed, tree: dict[str, Any], layer: Mapping[str, Any], path: str, origin: str) -> None:
    """Merge a layer into the tree in place; both are the mapping at ``path``."""
    for key, given in layer.items():
        at = _join(path, key)
        old, new = tree.get(key, _ABSENT), given
        if path in COLLECTIONS and new is None:
            if old is _ABSENT:
                raise ConfigError(f"{at} ({origin}): null removes an entry; there is no {key!r}{suggest(key, tree)}")
            del tree[key]
            _forget(composed, at)
            continue
        if isinstance(new, Mapping) and ((isinstance(old, list) and origin == "flag") or _opaque(old, at)):
            raise ConfigError(f"{at} ({origin}): a {type(old).__name__} ({composed.where(at)}) is only replaced whole.")
        if isinstance(old, str) and isinstance(new, Mapping) and _short(old, at):
            old = tree[key] = {"name": old}
            composed.origins[f"{at}.name"] = composed.origins.get(at, origin)  # what ``${...}`` filled has none
        elif isinstance(old, dict) and isinstance(new, str) and _short(new, at) and "${" not in new:
            new = {"name": new}  # ${...} may stand for a mapping: it replaces
        if isinstance(old, dict) and isinstance(new, Mapping) and (at in COLLECTIONS or not _renamed(old, new)):
            _merge(composed, old, new, at, origin)
            continue
        if isinstance(old, dict):
            _forget(composed, at)
        composed.origins[at] = origin
        if isinstance(new, Mapping):
            tree[key] = {}
            _merge(composed, tree[key], new, at, origin)
        else:
            tree[key] = copy.deepcopy(new)


def _short(text: str, path: str) -> bool:
    """Whether a string at a key path is short for ``{name: string}``; ``${...}`` may stand for a mapping anywhere."""
    return path not in COLLECTIONS and ("${" in text or not path.startswith(_FOREIGN))


def _opaque(value: Any, path: str) -> bool:
    """``model.tasks: ${...}``: entries cannot be added to what is not known yet."""
    return isinstance(value, str) and path in COLLECTIONS


def _renamed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    before, after = ({key: node[key] for key in ("name", "class_path") if key in node} for node in (old, new))
    return bool(before and after) and not after.items() <= before.items()


def _forget(composed: Composed, path: str) -> None:
    for known in [known for known in composed.origins if known == path or known.startswith(f"{path}.")]:
        del composed.origins[known]


def _flag_layer(flags: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """All flags as one mapping: ``--a decoder`` and ``--a.width 64`` add up in either order."""
    layer: dict[str, Any] = {}
    for path, text in sorted(flags, key=lambda flag: flag[0].count(".")):
        *parents, leaf = path.split(".")
        if not all((*parents, leaf)):
            raise ConfigError(f"flag --{path}: a part of the key is empty.")
        # a value of one word or path may have a #, which begins no comment in a shell
        comment = _COMMENT.search(text) and text.lstrip()[0] not in "[{'\""
        plain = not text.strip() or comment or PLACEHOLDER.match(text)  # {subset}/images is no mapping
        nested = {leaf: text if plain else parse_yaml(text, f"flag --{path}")}
        for key in reversed(parents):
            nested = {key: nested}
        _add(layer, nested, "")
    return layer


def _add(node: dict[str, Any], given: Mapping[str, Any], path: str) -> None:
    """Merge flags with flags: nothing is forgotten and ``null`` is kept for :func:`_merge`."""
    for key, new in given.items():
        at, old = _join(path, key), node.get(key, _ABSENT)
        if isinstance(old, str) and isinstance(new, Mapping) and _short(old, at):
            old = node[key] = {"name": old}
        if isinstance(new, str) and isinstance(old, dict) and _short(new, at):
            new = {"name": new}
        if isinstance(old, dict) and isinstance(new, Mapping):
            _add(old, new, at)
        elif isinstance(new, Mapping) and old is not _ABSENT:
            raise ConfigError(f"flag --{at}: {old!r} contradicts --{at}.{next(iter(new), '')}; give one of them.")
        else:
            node[key] = new


def _inline(node: Any, given: Any, path: str) -> Any:
    """Add options to a node that ``${...}`` filled.

    Args:
        node: the resolved value, e.g. ``{name: {name: x, a: 1}, b: 2}``, which becomes ``{name: x, a: 1, b: 2}``.
        given: the same before it was resolved, ``{name: "${other}", b: 2}``.
        path: its key path.
    """
    if isinstance(node, list) and isinstance(given, list):
        return [_inline(*items, path) for items in zip(node, given, strict=True)]
    if not isinstance(node, dict) or not isinstance(given, dict):
        return node
    node = {key: _inline(value, given[key], _join(path, key)) for key, value in node.items()}
    if path in COLLECTIONS or not (isinstance(node.get("name"), dict) and isinstance(given["name"], str)):
        return node
    merged = Composed(node.pop("name"))
    _merge(merged, merged.values, node, path, "")
    return merged.values
