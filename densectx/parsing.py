"""Arguments of commands: argparse whose errors are ours."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, Final, NoReturn, final

from densectx.arguments import TOP_LEVEL, split_arguments
from densectx.errors import ConfigError, unknown
from densectx.imports import allow_import

STATUSES: Final = """\
exit status: 0 done, 2 config or usage, 3 data, 4 checkpoint, 5 plug-in, 6 numeric, 7 distributed, 8 storage,
9 out of memory, 130 interrupted, 143 stopped by SIGTERM or SIGHUP, 1 a bug
"""
"""Of every command, for ``densectx --help``; the help of a command says what is special to it."""

FLAGS: Final = "flags as fit's, --KEY.KEY VALUE, are merged last"
"""For the help of commands that :func:`take_flags`."""


@final
class Parser(argparse.ArgumentParser):
    """Usage errors are config errors: one line, status 2. Options are not abbreviated.

    Args:
        command: ``"predict"``; the program is ``densectx predict``.
        options: of :class:`argparse.ArgumentParser`.
    """

    def __init__(self, command: str, **options: Any) -> None:
        self._known: list[str] = []
        super().__init__(prog=f"densectx {command}", allow_abbrev=False, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's; remembers the names of options for suggestions."""
        action = super().add_argument(*names, **options)
        self._known += action.option_strings
        return action

    def add_allow_import(self, text: str = "as for fit") -> None:
        """Take ``--allow-import PKG``, any number of times; :meth:`parse` obeys it."""
        self.add_argument("--allow-import", action="append", default=[], metavar="PKG", help=text)

    def parse(self, argv: Sequence[str], *, intermixed: bool = False) -> argparse.Namespace:
        """Read the arguments, and allow the packages of ``--allow-import``.

        Args:
            argv: what follows the command.
            intermixed: whether options may stand between the values of an argument that takes several.

        Raises:
            ConfigError: wrong usage; of an unknown option the nearest known one is named.
        """
        read = self.parse_known_intermixed_args if intermixed else self.parse_known_args
        given, extra = read(list(argv))
        if extra:
            wrong = next((text for text in extra if text.startswith("-")), "")
            said = unknown("option", wrong.partition("=")[0], self._known) if wrong else f"unexpected {extra[0]!r}"
            self.error(said.removesuffix("."))
        for package in getattr(given, "allow_import", []):
            allow_import(package)
        return given

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(f"{self.prog.removeprefix('densectx ')}: {message}. `{self.prog} --help` describes it.")


def take_flags(argv: Sequence[str]) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Take the flags of a config, such as ``--data.num_workers 2``, out of a command's arguments.

    Returns:
        The other arguments, and (dotted key path, YAML text) for :func:`densectx.config.compose`.

    Raises:
        ConfigError: a flag has no value.
    """
    rest, others, flags = list(argv), [], []
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and re.split("[.=]", word[2:])[0] in TOP_LEVEL:
            flags += [word, *([] if "=" in word else rest[:1])]
            rest = rest if "=" in word else rest[1:]
        else:
            others.append(word)
    return others, split_arguments(flags, {}).flags
