"""``${...}`` in composed configs: OmegaConf's grammar, keys from the root, bounded in size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from densectx.errors import ConfigError, suggest

MAX_SIZE = 1_000_000

_Path: TypeAlias = tuple[str, ...]


def resolve(values: dict[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """The values with every ``${a.b}``, ``${.sibling}``, ``${oc.env:VAR,default}`` replaced.

    Args:
        values: plain values, keys without dots.
        where: dotted key path -> origin, for messages.

    Raises:
        ConfigError: one that cannot be resolved, runs in a circle, or makes the config huge; a required value
            (``???``) that is not given. The key path and its origin are named.
    """
    try:
        _refuse_growth(values)
        config = OmegaConf.create(values)
        resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]  # of a dict
    except RecursionError:
        raise ConfigError("the ${...} of this config refer to each other in too long a chain.") from None
    except OmegaConfBaseException as error:
        raise ConfigError(_message(error, values, where)) from None
    for at, value in _nodes(resolved, ()):
        if isinstance(value, str) and "${" in value:  # a saved config would read it as an interpolation
            path = ".".join(at)
            raise ConfigError(f"{path} ({where(path)}): the text {value!r} contains '${{', which values may not.")
    return resolved


def _message(error: OmegaConfBaseException, values: Mapping[str, Any], where: Callable[[str], str]) -> str:
    path = error.full_key or ""
    at = f"{path} ({where(path)})"
    if isinstance(error, MissingMandatoryValue):
        return f"{at} is '???': a value has to be given."
    text = _find(values, tuple(re.findall(r"[^.\[\]]+", path)))
    reason, near = str(error).splitlines()[0].rstrip("."), "."
    if missing := re.match(r"Interpolation key '(.*)' not found", reason):
        near = suggest(missing[1], [".".join(key) for key, _ in _nodes(values, ())])
    return f"{at}: {text!r} cannot be resolved: {reason}{near}"


def _nodes(node: Any, at: _Path) -> Iterator[tuple[_Path, Any]]:
    for key, value in _children(node):
        yield (*at, key), value
        yield from _nodes(value, (*at, key))


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return list(node.items())
    return [(str(index), value) for index, value in enumerate(node)] if isinstance(node, list) else []


def _find(node: Any, at: _Path) -> Any:
    for key in at:
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _refuse_growth(values: dict[str, Any]) -> None:
    """Bound the size after resolution from the references alone: ``a: ${b}${b}``, ``b: ${c}${c}``, ... doubles."""
    known: dict[_Path, int] = {}

    def size(at: _Path, node: Any) -> int:
        if at not in known:
            known[at] = 1  # a circle ends here; OmegaConf names it
            if isinstance(node, str):
                total = len(node) + sum(size(ref, _find(values, ref)) for ref in _references(node, at))
            else:
                total = 1 + sum(size((*at, key), value) for key, value in _children(node))
            known[at] = min(total, MAX_SIZE + 1)
        return known[at]

    if size((), values) > MAX_SIZE:
        raise ConfigError(f"the ${{...}} of this config make it larger than {MAX_SIZE} characters.")


def _references(text: str, at: _Path) -> Iterator[_Path]:
    if "${" not in text:
        return
    for token in re.findall(r"[\w.\[\]-]+", text):
        parts = tuple(re.findall(r"[^.\[\]]+", token))
        up = len(token) - len(token.lstrip("."))
        yield (*at[: len(at) - up], *parts) if up else parts
