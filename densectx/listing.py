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
from densectx.registry import REGISTRIES, Entry, Registry, documentation, strays

CHECK_SECONDS: Final = 120.0
_REFUSED: Final = ("requirement not met", "not read")

_CHECK = """
import json, sys
from densectx.errors import DensectxError
from densectx.registry import REGISTRIES
for place, (kind, name) in enumerate(json.loads(sys.argv[1])):
    said = ""
    try:
        REGISTRIES[kind].get(name)
    except DensectxError as error:
        said = str(error)
    sys.stdout.write("\\ndensectx checked " + json.dumps([place, said]) + "\\n")
    sys.stdout.flush()
"""


@final
@dataclass(frozen=True)
class Listed:
    """One line of ``densectx list``.

    Attributes:
        entry: the registered name.
        status: ``ok``, ``clash``, ``missing module``, ``requirement not met``, ``not read`` (a group of entry points
            that is no kind, a name that nothing can ask for) or, after a check, ``broken``.
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
    """Every registered name of these kinds with its status, and entry points of groups that are no kind.

    Args:
        kinds: plural kinds.
        check: import the entries of each other distribution, in a process of its own; what is broken is told and
            harms nothing.
    """
    lines = []
    for kind in kinds:
        entries = REGISTRIES[kind].entries()
        count = Counter(entry.name for entry in entries)
        lines += [_judge(entry, clash=count[entry.name] > 1) for entry in entries]
    if check:
        importable = [line.entry for line in lines if line.entry.entry_point and line.status not in _REFUSED]
        broken: dict[Entry, str] = {}
        for distribution in sorted({entry.distribution for entry in importable}):
            broken |= _broken([entry for entry in importable if entry.distribution == distribution])
        lines = [Listed(line.entry, "broken", broken[line.entry]) if broken.get(line.entry) else line for line in lines]
    return lines + [Listed(entry, "not read", why) for entry, why in strays()]


def _judge(entry: Entry, clash: bool) -> Listed:
    if entry.misnamed:
        return Listed(entry, "not read", entry.misnamed)
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


def _broken(entries: list[Entry]) -> dict[Entry, str]:
    """Why entries cannot be imported, ``""`` for those that can; one process, and where it dies one for each."""
    names = [(entry.kind, f"{entry.distribution}/{entry.name}") for entry in entries]
    command, environment = child_command("-c", _CHECK, json.dumps(names))
    try:  # in another process: an import may exit, hang or take the process down
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_SECONDS, check=False
        )
        output, error = (stream.decode(errors="backslashreplace").splitlines() for stream in (done.stdout, done.stderr))
        failure = error[-1] if error else f"importing it ended the process with status {done.returncode}"
    except subprocess.TimeoutExpired:
        output, failure = [], f"importing it takes longer than {CHECK_SECONDS:g} s"
    told = [
        json.loads(line.removeprefix("densectx checked ")) for line in output if line.startswith("densectx checked ")
    ]
    if len(told) == len(entries):
        return {entries[place]: said for place, said in told}
    if len(entries) == 1:
        return {entries[0]: failure}
    return {entry: why for one in entries for entry, why in _broken([one]).items()}


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
