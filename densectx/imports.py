"""Importing what a name stands for: an entry point, or a path of a package that the user trusts."""

from __future__ import annotations

import importlib
import linecache
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from densectx.errors import ConfigError

Factory = Callable[..., Any]

_allowed: set[str] = set()


def allow_import(package: str) -> None:
    """Let configs name ``"package.module:Attr"`` of this package (the command line's ``--allow-import``)."""
    _allowed.add(package)


def allowed_imports() -> list[str]:
    """The packages that :func:`allow_import` was called for."""
    return sorted(_allowed)


def import_allowed(kind: str, target: str) -> Factory:
    """The attribute that ``"package.module:Attr"`` names.

    Args:
        kind: what it is to be, for messages.
        target: the path.

    Raises:
        ConfigError: a package that is not allowed, or that does not have it.
    """
    package = target.partition(":")[0].partition(".")[0]
    if package not in _allowed:
        raise ConfigError(
            f"{kind} {target!r}: importing {package!r} from a config is not allowed;"
            f" register it as an entry point, or pass --allow-import {package} if you trust it."
        )
    try:
        factory = attribute_of(target)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{kind} {target!r} cannot be imported: {reason(error)}.") from error
    if not callable(factory):
        raise ConfigError(f"{kind} {target!r} is not callable.")
    return factory  # type: ignore[no-any-return]  # getattr returns Any


def attribute_of(target: str) -> Any:
    """``"package.module:Attr"``, imported."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def child_command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """A command and an environment that start this Python again, where the same can be imported.

    Args:
        arguments: of Python, such as ``-m densectx``.
    """
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    # -P: the working directory may hold any difflib.py, and would come first
    return [sys.executable, "-P", *arguments], {**os.environ, "PYTHONPATH": path}


def reason(error: BaseException) -> str:
    """What went wrong in foreign code, on one line: the error, and the last places of its traceback outside of here."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    places = [_place(frame.filename, frame.lineno) for frame in frames if _foreign(frame.filename)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append(_place(error.filename, error.lineno))
    return f"{text} ({'; '.join(places[-2:])})" if places else text


def _foreign(file: str) -> bool:
    return not file.startswith("<frozen") and Path(file).parent != Path(__file__).parent and "importlib" not in file


def _place(file: str, line: int | None) -> str:
    code = linecache.getline(file, line or 0).strip()
    return f"{file}, line {line}: {code}" if code else f"{file}, line {line}"
