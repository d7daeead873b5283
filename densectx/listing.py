"""``densectx list`` and ``densectx show``: what is registered, judged from metadata alone. Imports no torch."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, final

import densectx
from densectx.distributions import unmet
from densectx.docstrings import plain
from densectx.errors import ConfigError, unknown
from densectx.imports import child_command
from densectx.registry import REGISTRIES, Entry, Registry, documentation

CHECK_SECONDS: Final = 120.0

_CHECK = """
import sys
from densectx.errors import DensectxError
from densectx.registry import REGISTRIES
try:
    REGISTRIES[sys.argv[1]].get(sys.argv[2])
except DensectxError as error:
    sys.exit(str(error))
sys.stdout.write("\\nloaded " + sys.argv[2])
"""


@final
@dataclass(frozen=True)
class Listed:
    """One line of ``densectx list``.

    Attributes:
        entry: the registered name.
        status: ``ok``, ``clash``, ``missing module``, ``requirement not met`` or, after a check, ``broken``.
        reason: why it is not ``ok``.
    """

    entry: Entry
    status: str
    reason: str = ""


def registry_of(kind: str) -> Registry[object]:
    """The registry of a kind, plural or singular.

    Raises:
        ConfigError: unknown kind; the nearest known one is suggested.
    """
    for registry in REGISTRIES.values():
        if kind in (registry.kind, registry.singular):
            return registry
    raise ConfigError(unknown("kind", kind, REGISTRIES))


def listed(kinds: list[str], check: bool = False) -> list[Listed]:
    """Every registered name of these kinds with its status.

    Args:
        kinds: plural kinds.
        check: import each entry of another distribution, in a process of its own; one that is broken is told and
            harms nothing.
    """
    lines = []
    for kind in kinds:
        entries = REGISTRIES[kind].entries()
        count = Counter(entry.name for entry in entries)
        for entry in entries:
            line = _judge(entry, clash=count[entry.name] > 1)
            importable = entry.entry_point is not None and line.status != "requirement not met"
            if check and importable and (reason := _broken(entry)):
                line = Listed(entry, "broken", reason)
            lines.append(line)
    return lines


def _judge(entry: Entry, clash: bool) -> Listed:
    if clash:
        return Listed(entry, "clash", f"another distribution provides it too; write {entry.distribution}/{entry.name}")
    if entry.entry_point is None:
        return Listed(entry, "ok")
    package = entry.target.partition(":")[0].partition(".")[0].strip()
    try:
        found = bool(package) and find_spec(package) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        return Listed(entry, "missing module", f"there is no module {package!r}")
    if reason := unmet(entry.entry_point, densectx.__version__):
        return Listed(entry, "requirement not met", reason)
    return Listed(entry, "ok")


def _broken(entry: Entry) -> str:
    """Why an entry cannot be imported, or ``""``. Own process: an import may exit, hang or take the process down."""
    name = f"{entry.distribution}/{entry.name}"
    command, environment = child_command("-c", _CHECK, entry.kind, name)
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing it takes longer than {CHECK_SECONDS:g} s"
    output, error = (stream.decode(errors="backslashreplace").splitlines() for stream in (done.stdout, done.stderr))
    if done.returncode == 0 and output and output[-1] == f"loaded {name}":
        return ""
    return error[-1] if error else f"importing it ended the process with status {done.returncode}"


def table(lines: list[Listed]) -> str:
    """Aligned columns, the reason after the status."""
    rows = [("KIND", "NAME", "DISTRIBUTION", "VERSION", "STATUS")]
    for line in lines:
        status = f"{line.status}: {line.reason}" if line.reason else line.status
        rows.append((line.entry.kind, line.entry.name, line.entry.distribution, line.entry.version or "-", status))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def as_json(lines: list[Listed]) -> str:
    """One object with ``"format": 1``."""
    entries = [
        {
            "kind": line.entry.kind,
            "name": line.entry.name,
            "distribution": line.entry.distribution,
            "version": line.entry.version,
            "target": line.entry.target,
            "status": line.status,
            "reason": line.reason,
        }
        for line in lines
    ]
    return json.dumps({"format": 1, "entries": entries}, indent=2) + "\n"


def shown(kind: str, name: str) -> str:
    """Origin, options that a config may set, and docstring of one name; imports it.

    Raises:
        ConfigError: unknown kind or name.
        PluginError: as :meth:`densectx.registry.Registry.get`.
    """
    registry = registry_of(kind)
    entry = registry.entry(name)
    options = [option for key, option in registry.options(name).items() if key not in registry.runtime]
    lines = [f"{registry.singular} {entry.name}", f"from {entry.origin} ({entry.target})", "", "options:"]
    lines += [f"  {_option(option)}" for option in options] or ["  none"]
    text = _without(documentation(registry.get(name)), registry.runtime)
    return "\n".join([*lines, "", plain(_padded(text))]).rstrip() + "\n"


def _without(text: str, names: Iterable[str]) -> str:
    """A docstring without the descriptions of some arguments."""
    for name in names:
        text = re.sub(rf"^    {name}: .*(\n     .*)*\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"^Args:\n*(?=\S|\Z)", "", text, flags=re.MULTILINE)


def _padded(text: str) -> str:
    """With a space more behind a cell of a table for each mark that :func:`plain` makes shorter by one."""
    return re.sub(r"(\S(?: ?\S)*) {2,}", lambda cell: cell[0] + " " * cell[1].count("``"), text)


def _option(option: inspect.Parameter) -> str:
    text = option.name
    if option.annotation is not option.empty:
        given = option.annotation
        text += f": {given if isinstance(given, str) else inspect.formatannotation(given)}"
    return f"{text}  (no default)" if option.default is option.empty else f"{text} = {option.default!r}"
