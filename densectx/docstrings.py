"""Docstrings as texts of the command line."""

from __future__ import annotations

import inspect
import re


def arguments(text: str | None) -> dict[str, str]:
    """The arguments of a Google-style docstring with their descriptions on one line, see :func:`plain`."""
    found: dict[str, str] = {}
    _, _, section = inspect.cleandoc(text or "").partition("Args:\n")
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if line.startswith("     ") and found:
            found[next(reversed(found))] += " " + line.strip()
        else:
            name, _, description = line.strip().partition(": ")
            found[name] = description
    return {name: plain(description) for name, description in found.items()}


def plain(text: str) -> str:
    """Without the marks of Sphinx: a role is the name it stands for, double backticks are single ones."""
    return re.sub(r":\w+:`[~.]?([^`]+)`", r"\1", text).replace("``", "`")


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, without it."""
    return re.split(r"\.\s+(?=[A-Z])", text, maxsplit=1)[0].removesuffix(".")
