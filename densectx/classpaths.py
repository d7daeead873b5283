"""Nodes of a config that name a class of torch or Lightning: ``{class_path: ..., init_args: {...}}``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any, Final, Union, get_args, get_type_hints

from jsonargparse import ArgumentParser
from torch import Tensor

from densectx.config import Composed, check_keys
from densectx.errors import ConfigError, suggest
from densectx.typecheck import describe, fits

_KEYS: Final = ("class_path", "init_args", "dict_kwargs")
_SUPPLIED: Final = ("params", "optimizer")


def check_class_paths(node: Any, path: str, allowed: Collection[str], composed: Composed) -> None:
    """Refuse misspelt keys of every class node at and below a key path, and values that its class cannot mean.

    Nothing outside the allowed packages is imported.

    Args:
        node: what the config has at the path.
        path: dotted key path.
        allowed: packages that may be imported.
        composed: names file or flag in messages.

    Raises:
        ConfigError: an unknown key of a node, an argument that its class does not take, or a class that its module does
            not have; the nearest is suggested. An argument of a wrong type, or one that is missing.
    """
    if isinstance(node, list):
        for index, item in enumerate(node):
            check_class_paths(item, f"{path}[{index}]", allowed, composed)
    if not isinstance(node, Mapping):
        return
    if "name" in node and "class_path" not in node:  # what a string beside other layers becomes
        raise ConfigError(
            f"expected {{class_path: ..., init_args: {{...}}}} with a class such as torch.optim.AdamW, got"
            f" {node['name']!r} ({composed.where(path)}).",
            path,
        )
    check_keys(node, _KEYS, path, composed)
    arguments, target = node.get("init_args") or {}, node.get("class_path")
    if not isinstance(arguments, Mapping) or not isinstance(target, str):
        return
    where = f"{path}.class_path"
    cls = named(target, allowed, where, f" ({composed.where(where)})")
    takes = None if cls is None else _takes(cls)
    if cls is not None and takes is not None:
        check_keys(arguments, takes, f"{path}.init_args", composed)
        _check_values(cls, node, path, composed)
    for key, value in arguments.items():
        if isinstance(value, Mapping) and "class_path" in value:
            check_class_paths(value, f"{path}.init_args.{key}", allowed, composed)


def named(target: str, allowed: Collection[str], path: str, origin: str = "") -> Any:
    """The class that a config names, None where its module is not there or no allowed package has it.

    Args:
        target: dotted name.
        allowed: packages that may be imported.
        path: dotted key path, for messages.
        origin: words for the file or flag, for messages.

    Raises:
        ConfigError: the module has no such class; the nearest is suggested.
    """
    module, _, name = target.rpartition(".")
    if not any(module == package or module.startswith(f"{package}.") for package in allowed):
        return None
    try:
        found = importlib.import_module(module)
    except (ImportError, AttributeError, ValueError):
        return None
    if not hasattr(found, name):
        known = [other for other in dir(found) if inspect.isclass(getattr(found, other, None))]
        raise ConfigError(f"{module} has no class {name!r}{origin}{suggest(name, known)}", path)
    return getattr(found, name)


def _takes(cls: Any) -> list[str] | None:
    """The argument names of a class, None where only jsonargparse can tell."""
    try:
        parameters = inspect.signature(cls).parameters
        names = list(parameters)
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            # jsonargparse follows **kwargs to where they go, and refuses what is not found there
            names = ArgumentParser(exit_on_error=False).add_class_arguments(cls, fail_untyped=False)
    except (TypeError, ValueError):
        return None
    return [key for key in names if key not in _SUPPLIED]


def _check_values(cls: Any, node: Mapping[str, Any], path: str, composed: Composed) -> None:
    """Refuse values that do not fit what the class says of them, and see that those without a default are there.

    What its signature does not tell, such as what ``**kwargs`` are for, is left to jsonargparse.
    """
    parameters, arguments = inspect.signature(cls).parameters, node.get("init_args") or {}
    try:
        hints = get_type_hints(cls.__init__)
    except (NameError, TypeError):  # an annotation that stands for nothing at run time
        hints = {}
    for key, value in arguments.items():
        hint = hints.get(key, Any)
        if Tensor in get_args(hint):  # a config holds none, and a class is believed to be anything
            hint = Union[tuple(one for one in get_args(hint) if one is not Tensor)]  # noqa: UP007 - of a tuple
        if not fits(value, hint):
            where = f"{path}.init_args.{key}"
            raise ConfigError(f"expected {describe(hint)}, got {value!r} ({composed.where(where)}).", where)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [key for key, p in parameters.items() if p.default is p.empty and p.kind in kinds and key not in _SUPPLIED]
    given = {*arguments, *(node.get("dict_kwargs") or {})}
    if missing := [key for key in needed if key not in given]:
        raise ConfigError(
            f"{node['class_path']} needs {' and '.join(missing)} ({composed.where(path)}).", f"{path}.init_args"
        )
