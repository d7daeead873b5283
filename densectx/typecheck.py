"""Do the values of a config fit the annotations of the signature that they are for?"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

_PLAIN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config may stand for an annotation; whole numbers are numbers, lists are tuples.

    Annotations that no config value can be told from (classes, callables, ``Any``) accept everything.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if hint in _PLAIN:
        return isinstance(value, hint)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        values = arguments[1] if len(arguments) == 2 else Any
        return isinstance(value, Mapping) and all(fits(item, values) for item in value.values())
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return all(fits(item, arguments[0]) for item in value) if arguments else True
    return True


def describe(hint: Any) -> str:
    """What an annotation expects, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list ({describe(arguments[0])} each)" if arguments else "a list"
    return str(hint)
