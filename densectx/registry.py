"""Names to classes: built-in tables, decorators and entry points, resolved lazily. Standard library only.

Packages extend densectx with one line, ``[project.entry-points."densectx.tasks"] edges = "my_package:Edges"``;
nothing of theirs is imported before the name is used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar, get_type_hints

from densectx.builtin import BUILTIN
from densectx.distributions import PREFIX, external, outside, unmet
from densectx.errors import ConfigError, DataError, DensectxError, PluginError, suggest, unknown
from densectx.imports import Factory, allow_import, allowed_imports, attribute_of, import_allowed, reason
from densectx.typecheck import describe, fits
from densectx.types import Spec

__all__ = ["REGISTRIES", "Entry", "Registry", "allow_import", "allowed_imports", "documentation"]

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One registered name: where it comes from, without importing it."""

    kind: str
    name: str
    distribution: str
    version: str
    target: str
    entry_point: EntryPoint | None = None

    @property
    def origin(self) -> str:
        """``"distribution version"``, as errors name it."""
        return f"{self.distribution} {self.version}".strip()

    @property
    def misnamed(self) -> str:
        """Why nothing can ask for the name, ``""`` if it can."""
        if "/" not in self.name and ":" not in self.name:
            return ""
        return "its name may hold neither '/', which stands behind a distribution, nor ':', which stands in a path"


class Registry(Generic[T]):
    """One kind of part by name: built-ins, names registered in this process, entry points ``densectx.<kind>``.

    Args:
        kind: plural of the kind, e.g. ``"tasks"``.
        builtin: name -> ``"module:attribute"`` of densectx's own.
        contract: ``"module:attribute"`` of the class that every part is an instance of; ``""`` for none.
        runtime: arguments that densectx supplies and no config may set.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str], contract: str = "", runtime: Sequence[str] = ()) -> None:
        self.kind, self.contract, self.runtime = kind, contract, tuple(runtime)
        self.singular = kind.removesuffix("es") if kind == "losses" else kind.removesuffix("s")
        self._builtin = dict(builtin)
        self._local: dict[str, Factory] = {}

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Decorator for notebooks and tests. The same object twice is a no-op.

        Raises:
            PluginError: another object is registered under the name; both packages are named. A name with a slash or
                a colon.
        """

        def decorate(factory: Factory) -> Factory:
            if why := Entry(self.kind, name, "", "", "").misnamed:
                raise PluginError(f"{self.singular} {name!r} of {factory.__module__}: {why}; choose another name.")
            taken = [entry for entry in self.entries() if entry.name == name]
            if self._local.get(name) is not factory:
                if taken:
                    raise PluginError(
                        f"{self.singular} {name!r} of {factory.__module__} is already provided by {taken[0].origin}"
                        f" ({taken[0].target}); choose another name."
                    )
                self._local[name] = factory
            return factory

        return decorate

    def unregister(self, name: str) -> None:
        """Forget a name registered in this process."""
        self._local.pop(name, None)

    def entries(self) -> list[Entry]:
        """All registered names, sorted; a name that several distributions provide appears once for each."""
        found = [Entry(self.kind, name, "densectx", _version(), target) for name, target in self._builtin.items()]
        for name, factory in self._local.items():
            found.append(Entry(self.kind, name, factory.__module__, "", f"{factory.__module__}:{_name(factory)}"))
        found += [_of_point(self.kind, point) for point in external(self.kind)]
        return sorted(set(found), key=lambda entry: (entry.name, entry.distribution, entry.target))

    def names(self) -> list[str]:
        """Every registered name; imports nothing."""
        return sorted({entry.name for entry in self.entries()})

    def entry(self, name: str) -> Entry:
        """The entry of a name; ``"distribution/name"`` settles a clash.

        Raises:
            ConfigError: unknown name; the nearest known one is suggested.
            PluginError: several distributions provide the name; both are named with their versions. The name has a
                slash or a colon.
        """
        distribution, _, short = name.rpartition("/")
        found = [e for e in self.entries() if e.name == short and distribution in ("", e.distribution)]
        if not found:
            raise self._unknown(name, short)
        if len(found) > 1:
            both = " and ".join(f"{e.origin} ({e.target})" for e in found)
            choices = " or ".join(repr(f"{e.distribution}/{short}") for e in found)
            raise PluginError(f"{self.singular} {short!r} is provided by {both}; write {choices}, or uninstall one.")
        return found[0]

    def _unknown(self, name: str, short: str) -> DensectxError:
        """The error for a name without an entry, or with one that cannot be asked for."""
        for entry in self.entries():
            if entry.misnamed and name in (entry.name, f"{entry.distribution}/{entry.name}"):
                said = f"{self.singular} {entry.name!r} ({entry.target} of {entry.origin})"
                return PluginError(f"{said} cannot be used: {entry.misnamed}.")
        text = f"{unknown(self.singular, name, self.names())} `densectx list {self.kind}` prints them."
        unread = [f"{entry.origin} has one, but {why}" for entry, why in strays() if entry.name == short]
        return ConfigError(" ".join([text, *unread]))

    def get(self, name: str) -> Factory:
        """The class or factory of a name, imported now. ``"package.module:Attr"`` needs an allow-listed package.

        Raises:
            ConfigError: unknown name, or a package that is not allow-listed.
            PluginError: the package cannot be imported, or does not accept this version of densectx; its distribution,
                version and the reason are named. It is not callable, or an abstract class.
        """
        factory, said = self._imported(name)
        if not callable(factory):
            raise PluginError(f"{said} is not callable.")
        if missing := sorted(getattr(factory, "__abstractmethods__", ())):
            raise PluginError(f"{said} lacks {', '.join(missing)}: an abstract class cannot be built.")
        return factory

    def _imported(self, name: str) -> tuple[Factory, str]:
        """What a name stands for, and what messages call it."""
        if ":" in name:
            return import_allowed(self.singular, name), f"{self.singular} {name!r}"
        entry = self.entry(name)
        said = f"{self.singular} {name!r} ({entry.target} of {entry.origin})"
        if entry.entry_point is None:
            own = entry.distribution == "densectx"
            return attribute_of(entry.target) if own else self._local[entry.name], said
        if refusal := unmet(entry.entry_point, _version()):
            raise PluginError(
                f"{said} cannot be used: {refusal}. Install a version of {entry.distribution} and one of densectx that"
                " fit, or uninstall it."
            )
        try:
            return entry.entry_point.load(), said
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{said} cannot be loaded: {reason(error)}. Repair or uninstall {entry.distribution}."
            ) from error

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The keyword options of a name, from its signature, runtime arguments included."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(self.get(name)).parameters
        return {key: value for key, value in parameters.items() if value.kind in kinds}

    def check(
        self, spec: Spec, runtime: Iterable[str] = (), where: str = "", also: Iterable[str] = ()
    ) -> tuple[str, dict[str, Any]]:
        """Split a spec into name and options, both checked; builds nothing.

        Args:
            spec: ``"name"`` or ``{"name": ..., option: value}``.
            runtime: names of the arguments that the caller supplies; a spec may not set them.
            where: key path of the spec, for messages.
            also: keys beside the options that the caller has taken out, for suggestions.

        Raises:
            ConfigError: no name, unknown name or option, a value of another type than the signature says, runtime
                argument set, required option missing.
        """
        if isinstance(spec, str):
            spec = {"name": spec}
        if isinstance(spec, Mapping) and "name" not in spec and (near := get_close_matches("name", map(str, spec), 1)):
            raise ConfigError(f"unknown key {near[0]!r}; did you mean 'name'?", where)
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise ConfigError(
                f"expected a {self.singular} as a name or a mapping with 'name', got {spec!r}."
                f" `densectx list {self.kind}` prints the names.",
                where,
            )
        name, given = spec["name"], {str(k): v for k, v in spec.items() if k != "name"}
        try:
            options, supplied = self.options(name), set(runtime)
        except ConfigError as error:
            raise error.within(where) from None
        hints = _hints(self.get(name))
        known = sorted(set(options) - supplied)
        for key, value in given.items():
            if key in supplied:
                raise ConfigError(
                    f"{self.singular} {name!r}: option {key!r} is set by densectx, not by a config.", where
                )
            if key not in options:
                raise ConfigError(
                    f"{self.singular} {name!r} has no option {key!r}{suggest(key, [*known, *also])}"
                    f" Its options: {', '.join([*known, *also]) or 'none'}.",
                    where,
                )
            if key in hints and not fits(value, hints[key]):
                expected = describe(hints[key])
                raise ConfigError(f"expected {expected}, got {value!r}.", f"{where}.{key}" if where else key)
        missing = [key for key in known if options[key].default is inspect.Parameter.empty and key not in given]
        if missing:
            raise ConfigError(f"{self.singular} {name!r} needs {', '.join(map(repr, missing))}.", where)
        return name, given

    def build(self, spec: Spec, where: str = "", also: Iterable[str] = (), **runtime: Any) -> T:
        """Build the part that a spec names; only the runtime arguments that it takes are passed.

        Raises:
            ConfigError, PluginError: as :meth:`check` and :meth:`get`, and what the part refuses; what is built is no
                part of this kind; a part of another package fails with an error of its own.
            DataError: the part reads data that is missing or damaged.
        """
        name, given = self.check(spec, runtime, where, also)
        wanted = self.options(name)
        try:
            built: T = self.get(name)(**given, **{key: value for key, value in runtime.items() if key in wanted})
        except (ConfigError, DataError) as error:
            raise error.within(where) from error
        except (DensectxError, MemoryError):
            raise
        except Exception as error:
            if self._own(name):
                raise
            raise PluginError(self._failed(name, runtime, error)) from error
        if self.contract and not isinstance(built, attribute_of(self.contract)):
            base = self.contract.replace(":", ".")
            raise PluginError(
                f"{self.singular} {name!r} gives a {type(built).__name__}, which is no {base};"
                " derive it from that class."
            )
        return built

    def _own(self, name: str) -> bool:
        return ":" not in name and self.entry(name).distribution == "densectx"

    def _failed(self, name: str, runtime: Iterable[str], error: Exception) -> str:
        """What is said of a constructor of another package that raised."""
        factory, said = self._imported(name)
        text = f"{said} cannot be built: {reason(error)}."
        kinds = [parameter.kind for parameter in inspect.signature(factory).parameters.values()]
        unnamed = sorted(set(runtime) - set(self.options(name)))
        if inspect.Parameter.VAR_KEYWORD in kinds and unnamed:
            text += f" Nothing is passed to its **kwargs: name those that it needs of {', '.join(unnamed)}."
        return text


def _hints(factory: Factory) -> dict[str, Any]:
    """Annotations of the options; none where they name what only type checkers see."""
    target: Any = factory.func if isinstance(factory, partial) else factory
    if isinstance(target, type):
        # inherited or not; what the class body annotates are attributes
        target = target.__init__  # type: ignore[misc]  # mypy takes a class for an instance
    try:
        return get_type_hints(target)
    except (NameError, TypeError, AttributeError):
        return {}


def _version() -> str:
    """Of densectx; not the metadata's: a source tree may have none, or an old one."""
    return str(sys.modules["densectx"].__version__)


def _of_point(kind: str, point: EntryPoint) -> Entry:
    dist, version = (point.dist.name, point.dist.version) if point.dist else ("?", "")
    return Entry(kind, point.name, dist, version, point.value, point)


def _name(factory: Factory) -> str:
    return getattr(factory, "__qualname__", None) or repr(factory)


def documentation(factory: Factory) -> str:
    """The docstring of a class or factory; of the wrapped class for presets made with functools.partial."""
    return inspect.getdoc(factory.func if isinstance(factory, partial) else factory) or ""


_OF_HEADS = ("features", "in_channels", "out_channels", "scale", "residual", "exclusive")

BACKBONES: Registry[Any] = Registry("backbones", BUILTIN["backbones"], "densectx.backbones.base:Backbone")
CONTEXTS: Registry[Any] = Registry("contexts", BUILTIN["contexts"], "densectx.nn.context:Context", ["in_channels"])
HEADS: Registry[Any] = Registry("heads", BUILTIN["heads"], "densectx.heads.base:Head", _OF_HEADS)
TASKS: Registry[Any] = Registry(
    "tasks", BUILTIN["tasks"], "densectx.tasks.base:Task", ["features", "in_channels", "info"]
)
DATASETS: Registry[Any] = Registry("datasets", BUILTIN["datasets"], "densectx.data.base:Dataset", ["split"])
LOSSES: Registry[Any] = Registry(
    "losses", BUILTIN["losses"], "densectx.losses.base:Loss", ["form", "ignore_index", "classes"]
)
BALANCING: Registry[Any] = Registry("balancing", BUILTIN["balancing"], "densectx.balancing.base:Balancing", ["tasks"])
MODELS: Registry[Any] = Registry("models", BUILTIN["models"])

REGISTRIES: dict[str, Registry[Any]] = {
    registry.kind: registry for registry in (BACKBONES, CONTEXTS, HEADS, TASKS, DATASETS, LOSSES, BALANCING, MODELS)
}


def strays() -> list[tuple[Entry, str]]:
    """Entry points in groups ``densectx.<kind>`` of no kind, each with what is wrong."""
    kinds = [f"{PREFIX}{kind}" for kind in REGISTRIES]
    return [
        (
            _of_point(point.group.removeprefix(PREFIX), point),
            f"nothing reads {point.group!r}{suggest(point.group, kinds)}",
        )
        for point in outside(REGISTRIES)
    ]
