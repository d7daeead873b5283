"""Splitting the arguments of ``fit``, ``validate`` and ``test`` into files, config flags and options of the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, final

from densectx.errors import ConfigError, suggest

TOP_LEVEL: Final = ("model", "data", "trainer", "seed_everything", "init_from", "requires")
"""The top-level keys of a config."""

NESTED: Final = frozenset({"model", "data", "trainer"})
"""Those that hold mappings."""

Takes: TypeAlias = Literal["nothing", "value", "values"]
"""What an option takes; ``values``: it may be repeated, a value each time."""


@final
@dataclass(frozen=True)
class Arguments:
    """Split arguments.

    Attributes:
        files: the ``-c`` files, in order.
        flags: (dotted key path, YAML text) for :func:`densectx.config.compose`, in order.
        options: given option -> its values, in order; ``[]`` for one that takes nothing.
    """

    files: tuple[str, ...]
    flags: tuple[tuple[str, str], ...]
    options: dict[str, list[str]]


def split_arguments(argv: Sequence[str], options: Mapping[str, Takes]) -> Arguments:
    """Split arguments; nothing may be abbreviated.

    Args:
        argv: what follows the command.
        options: the command's own options, e.g. ``{"--resume": "value", "--debug": "nothing"}``.

    Raises:
        ConfigError: a positional or unknown argument (the nearest known one is named), a missing or superfluous
            value, an option given twice.
    """
    files: list[str] = []
    flags: list[tuple[str, str]] = []
    given: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, attached = token.partition("=") if token.startswith("--") else (token, "", "")
        takes = _takes(name, options)
        if takes == "nothing":
            if equals:
                raise ConfigError(f"{name} takes no value, got {attached!r}.")
            given[name] = []
            continue
        if not equals and (not rest or rest[0].startswith("--") or rest[0] == "-c"):
            raise ConfigError(f"{name} needs a value; one that begins with a dash is written {name}=VALUE.")
        value = attached if equals else rest.pop(0)
        if name in ("-c", "--config"):
            files.append(value)
        elif name not in options:
            flags.append((name.removeprefix("--"), value))
        elif takes == "value" and name in given:
            raise ConfigError(f"{name} is given twice ({given[name][0]!r} and {value!r}); give it once.")
        else:
            given.setdefault(name, []).append(value)
    return Arguments(tuple(files), tuple(flags), given)


def _takes(name: str, options: Mapping[str, Takes]) -> Takes:
    if name in options:
        return options[name]
    if not name.startswith("-") or name == "-":
        raise ConfigError(f"unexpected argument {name!r}; config files are given as -c {name}.")
    first, _, below = name.removeprefix("--").partition(".")
    if name in ("-c", "--config") or (name.startswith("--") and first in TOP_LEVEL and (not below or first in NESTED)):
        return "values"
    known = ["-c", "--config", *options, *(f"--{key}" for key in TOP_LEVEL)]
    near = suggest(name if not below else f"--{first}", known)
    raise ConfigError(f"unknown option {name!r}{near} Known: {', '.join(sorted(known))} and --KEY.KEY of a config.")
