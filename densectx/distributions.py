"""Installed distributions that extend densectx: their entry points, and whether they accept this version."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Collection
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

PREFIX = "densectx."
FOLDERS = {
    "densectx": ".",
    **{f"densectx-{name}": f"./plugins/densectx-{name}" for name in ("depth", "edges", "keypoints", "zoo")},
    "densectx-template": "./plugins/template",
}
"""Distribution -> where it lies in a checkout, of all in the repository of densectx."""


def how_to_install(requirement: str) -> str:
    """What to type for a requirement such as ``numpy>=2`` that is missing, without a full stop.

    densectx and the plug-ins of its repository are not on PyPI, where their names are anybody's to take, so these are
    installed from a checkout. Other names that begin alike are somebody's own packages.
    """
    match = re.match(r"\s*([\w.-]+)\s*(\[[^]]*\])?", requirement)
    name = re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""
    if match is None or name not in FOLDERS:
        return f"pip install {shlex.quote(requirement)}"
    folder = FOLDERS[name] + (match[2] or "")
    return f"pip install {shlex.quote(folder)} in a checkout of densectx ({name} is not on PyPI)"


def external(kind: str) -> tuple[EntryPoint, ...]:
    """The entry points ``densectx.<kind>`` of all distributions on ``sys.path``; imports nothing of theirs."""
    return _external(tuple(sys.path), tuple(map(_mark, sys.path))).get(kind, ())


def outside(kinds: Collection[str]) -> list[EntryPoint]:
    """The entry points of all groups ``densectx.<kind>`` that are of none of these kinds."""
    found = _external(tuple(sys.path), tuple(map(_mark, sys.path)))
    return [point for kind in sorted(set(found) - set(kinds)) for point in found[kind]]


@lru_cache(maxsize=4)
def _external(path: tuple[str, ...], marks: tuple[int, ...]) -> dict[str, tuple[EntryPoint, ...]]:
    """Read once for a state of ``sys.path``: with 100 distributions a scan takes 20 ms, and a model asks 25 times."""
    points = entry_points()
    return {
        group.removeprefix(PREFIX): tuple(points.select(group=group))
        for group in points.groups
        if group.startswith(PREFIX)
    }


def _mark(folder: str) -> int:
    """Changes when a distribution is installed into a folder or removed."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def unmet(point: EntryPoint, version: str) -> str:
    """Why the distribution of an entry point does not accept a version of densectx, ``""`` if it does.

    Its own ``Requires-Dist`` decides, as pip does; without a line about densectx every version is accepted.
    """
    from packaging.requirements import InvalidRequirement, Requirement  # takes time that most calls do not need
    from packaging.utils import canonicalize_name

    for text in (point.dist.requires if point.dist else None) or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            name = text.replace("_", "-").lower().lstrip()
            if name.startswith("densectx") and not name.startswith("densectx-"):
                return f"its requirement {text!r} cannot be understood; expected one such as densectx>=0.1"
            continue  # about something else; pip judges it
        if canonicalize_name(requirement.name) != "densectx":
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            return f"needs densectx{requirement.specifier}, this is {version}"
    return ""
