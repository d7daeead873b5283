"""Reading and writing YAML safely: plain values only, nothing repeated, nothing that grows without bound."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import yaml

from densectx.errors import ConfigError, suggest

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_ALIASES = 100
MAX_TEXT = 10_000  # characters of one value or key: messages repeat them
MAX_NODES = 20_000  # counted after aliases are expanded: nine levels of nine aliases stay under MAX_ALIASES

PLACEHOLDER = re.compile(r"\s*\{(?:subset|class|scale)\}")
"""Begins a text, a path of ``data.sources``, which YAML takes for a mapping."""

_UNQUOTED = re.compile(rf"(?:^|[:,[-]){PLACEHOLDER.pattern}")
_QUOTE = "quote a text that begins with {"
_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null")}
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")


@final
class _Loader(yaml.SafeLoader):
    """PyYAML's composer with limits.

    As in YAML 1.2, 1e-3 is a float, and dates, 1:30 (base 60) and 010 (octal) are strings.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012  # PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in rules if tag in (f"{_TAG}bool", f"{_TAG}null", f"{_TAG}merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.aliases = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node; refuses what is too large before time, memory or the stack is spent."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # types-PyYAML lacks it
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_ALIASES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_ALIASES} aliases", problem_mark=mark)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values", problem_mark=mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@final
class _Dumper(yaml.SafeDumper):
    """Quotes every string that :class:`_Loader` or a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write values in full."""
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
    _class.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    breaks = any(character in text for character in "\x85\u2028\u2029")  # PyYAML reads these back only escaped
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _represent_text)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8, larger than 1 MiB or not plain YAML: a repeated,
            dotted or non-string key, a tag, more than 64 levels, more than 100 aliases or 20,000 values, a value of
            more than 10,000 characters or 1024 bits; the file and, where there is one, the line are named.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = [str(other) for other in path.parent.glob("*.y*ml")]
        raise ConfigError(f"config file {str(path)!r} does not exist{suggest(str(path), near)}") from None
    except IsADirectoryError:
        raise ConfigError(f"config file {str(path)!r} is a directory; name a YAML file in it.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}.") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"config file {str(path)!r} is larger than 1 MiB; a config is a few kilobytes of YAML.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"config file {str(path)!r}, line {line}: not UTF-8 text.") from None
    values = parse_yaml(text, f"config file {str(path)!r}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(path)!r}: expected 'key: value' lines, got a {_kind(values)}.")
    return values


def parse_yaml(text: str, source: str) -> Any:
    """The plain value (mapping, list, string, number, bool, None) of a YAML text.

    Args:
        text: the YAML.
        source: what messages call it, e.g. ``"config file 'A.yaml'"``.

    Raises:
        ConfigError: as for :func:`load_yaml`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Builder(loader, source).value(node, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f", line {mark.line + 1}" if mark else ""
        detail = ", ".join(part for part in (error.context, error.problem) if part)
        if mark and _UNQUOTED.search("".join(text.splitlines()[mark.line : mark.line + 1])):
            detail += f"; {_QUOTE}"
        raise ConfigError(f"{source}{at}: {detail}.") from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # !!int x; !!bool x, !!float ''
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split()) or 'a value of another kind'}.") from None


def dump(values: Mapping[str, Any]) -> str:
    """YAML text that :func:`load_yaml` reads back to equal values, in the given order."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


@final
class _Builder:
    """Plain values from YAML nodes."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self._loader = loader
        self._source = source
        self._left = MAX_NODES

    def value(self, node: yaml.Node, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise self._error(node, f"more than {MAX_NODES} values once aliases are expanded")
        if depth > MAX_DEPTH:
            raise self._error(node, f"nested deeper than {MAX_DEPTH} levels (an alias of itself?)")
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_TEXT:
            raise self._error(node, f"a value of {len(node.value)} characters; a config has at most {MAX_TEXT}")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            value = self._loader.construct_object(node)
            if isinstance(value, int) and abs(value) >= 1 << 1024:
                raise self._error(node, "a whole number of more than 1024 bits")
            return value
        raise self._error(node, f"the tag {node.tag.replace(_TAG, '!!')!r} is not allowed; configs hold plain values")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        inherited: dict[str, Any] | None = None
        own: dict[str, Any] = {}
        if node.flow_style and len(node.value) == 1 and node.value[0][1].value == "" and not node.value[0][1].style:
            shown = f"{{{node.value[0][0].value}}}"
            if PLACEHOLDER.match(shown):
                raise self._error(node, f'{shown} is a mapping here; {_QUOTE}: "{shown}"')
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                if inherited is not None:
                    raise self._error(key_node, "duplicate key '<<'; give one with a list: <<: [*a, *b]")
                inherited = self._inherited(value_node, depth)
                continue
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{_TAG}str":
                shown = key[:80] if isinstance(key, str) else _kind(key)
                raise self._error(key_node, f"the key {shown} is not a string; quote it if it is meant to be one")
            if len(key) > MAX_TEXT:
                raise self._error(key_node, f"a key of {len(key)} characters; a config has at most {MAX_TEXT}")
            if key in own:
                raise self._error(key_node, f"duplicate key {key!r}; keep one of them")
            if "." in key:
                nested = key.replace(".", ": {") + ": ..." + "}" * key.count(".")
                raise self._error(key_node, f"dotted key {key!r}; write it nested: {nested}")
            own[key] = self.value(value_node, depth + 1)
        return (inherited or {}) | own

    def _inherited(self, node: yaml.Node, depth: int) -> dict[str, Any]:
        given = self.value(node, depth + 1)
        result: dict[str, Any] = {}
        for mapping in reversed(given if isinstance(given, list) else [given]):  # the first one wins
            if not isinstance(mapping, dict):
                raise self._error(node, "'<<' needs a mapping or a list of mappings")
            result |= mapping
        return result

    def _error(self, node: yaml.Node, problem: str) -> ConfigError:
        return ConfigError(f"{self._source}, line {node.start_mark.line + 1}: {problem}.")


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "mapping" if isinstance(value, dict) else f"single value {value!r}"
