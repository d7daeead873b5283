"""Nodes of a config that name a class of torch or Lightning: ``{class_path: ..., init_args: {...}}``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any, Final

from jsonargparse import ArgumentParser

from densectx.config import Composed, check_keys
from densectx.errors import ConfigError

_KEYS: Final = ("class_path", "init_args", "dict_kwargs")


def check_class_paths(node: Any, path: str, allowed: Collection[str], composed: Composed) -> None:
    """Refuse misspelt keys of every class node at and below a key path; values are left to jsonargparse.

    Nothing outside the allowed packages is imported.

    Args:
        node: what the config has at the path.
        path: dotted key path.
        allowed: packages that may be imported.
        composed: names file or flag in messages.

    Raises:
        ConfigError: an unknown key of a node, or an argument that its class does not take; the nearest is suggested.
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
    arguments, target = node.get("init_args"), node.get("class_path")
    if not isinstance(arguments, Mapping) or not isinstance(target, str):
        return
    takes = _takes(target, allowed)
    if takes is not None:
        check_keys(arguments, takes, f"{path}.init_args", composed)
    for key, value in arguments.items():
        if isinstance(value, Mapping) and "class_path" in value:
            check_class_paths(value, f"{path}.init_args.{key}", allowed, composed)


def _takes(target: str, allowed: Collection[str]) -> list[str] | None:
    """The argument names of a class, None where only jsonargparse can tell."""
    module, _, name = target.rpartition(".")
    if not any(module == package or module.startswith(f"{package}.") for package in allowed):
        return None
    try:
        cls = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(cls).parameters
        names = list(parameters)
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            # jsonargparse follows **kwargs to where they go, and refuses what is not found there
            names = ArgumentParser(exit_on_error=False).add_class_arguments(cls, fail_untyped=False)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return [key for key in names if key not in ("params", "optimizer")]  # those are supplied
