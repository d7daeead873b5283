"""What is checked: a registered name, a spec, or a class or factory that is registered nowhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias, get_type_hints

from densectx.registry import Registry, documentation
from densectx.testing.report import expect
from densectx.types import Spec

Subject: TypeAlias = Spec | Callable[..., Any]
"""``"edges"``, ``{"name": "edges", "threshold": 0.5}``, a class, or ``functools.partial(Edges, threshold=0.5)``."""


def called(registry: Registry[Any], subject: Subject) -> str:
    """``"task 'edges'"``."""
    name = subject.get("name") if isinstance(subject, Mapping) else subject
    if callable(name):
        target: Any = name.func if isinstance(name, partial) else name
        name = getattr(target, "__qualname__", repr(target))
    return f"{registry.singular} {name!r}"


@contextmanager
def named(registry: Registry[Any], subject: Subject) -> Iterator[dict[str, Any]]:
    """The subject as a spec; a class or factory is registered for as long."""
    if isinstance(subject, str | Mapping):
        yield {"name": subject} if isinstance(subject, str) else dict(subject)
        return
    name = f"under_test_{id(subject)}"
    registry.register(name)(subject)
    try:
        yield {"name": name}
    finally:
        registry.unregister(name)


def factory_of(registry: Registry[Any], subject: Subject) -> Any:
    """The class or factory."""
    with named(registry, subject) as spec:
        return registry.get(spec["name"])


def check_documented(registry: Registry[Any], subject: Subject, runtime: tuple[str, ...]) -> None:
    """A docstring, and options whose values a config can be checked against.

    Raises:
        CheckFailed: no docstring; an option without annotation, or whose annotation cannot be resolved.
    """
    factory = factory_of(registry, subject)
    kind = registry.singular
    target: Any = factory.func if isinstance(factory, partial) else factory
    text = documentation(factory)
    inherited = {inspect.getdoc(base) for base in target.__mro__[1:]} if isinstance(target, type) else set()
    expect(
        bool(text) and text not in inherited,
        "it has no docstring of its own",
        f"say in one what the {kind} does and what each option means; `densectx show {registry.kind}` prints it",
    )
    constructor: Any = inspect.getattr_static(target, "__init__") if isinstance(target, type) else target
    try:
        hints = get_type_hints(constructor)
    except (NameError, TypeError, AttributeError) as error:
        expect(
            False,
            f"the annotations of its options cannot be resolved ({error})",
            "import what they name at run time, not below `if TYPE_CHECKING`: config values are checked against them",
        )
    bare = [
        name
        for name, option in inspect.signature(factory).parameters.items()
        if name not in runtime and name not in hints and option.kind not in (option.VAR_POSITIONAL, option.VAR_KEYWORD)
    ]
    expect(
        not bare,
        f"options without annotation: {', '.join(bare)}",
        "annotate them (`sigma: float = 25.0`), so that a config with a wrong value is refused with its key path",
    )
