"""Arguments of commands: argparse whose errors are ours."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn, final

from densectx.errors import ConfigError


@final
class Parser(argparse.ArgumentParser):
    """Usage errors are config errors: one line, status 2. Options are not abbreviated.

    Args:
        command: ``"predict"``; the program is ``densectx predict``.
        options: of :class:`argparse.ArgumentParser`.
    """

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=f"densectx {command}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(f"{self.prog.removeprefix('densectx ')}: {message}. `{self.prog} --help` describes it.")
