"""HTML and SVG as text in which nothing that a run says can become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any, Final, TypeAlias, final

_VOID: Final = frozenset({"br", "img", "link", "meta"})
_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")  # no character references either


@final
class Html(str):
    """Text that is markup already; any other text is escaped."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Html | Iterable[Child] | None"


def tag(name: str, *children: Child, **attributes: Any) -> Html:
    """An element.

    Args:
        name: of the element.
        children: what is in it: markup, text (escaped), numbers, None for nothing, or iterables of these.
        attributes: by name; ``class_`` is ``class``, other underscores are hyphens; None leaves one out, True gives one
            without a value. Values are escaped.
    """
    given = "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Child) -> Html:
    """Children one after the other."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return Html(escaped(str(children)))
    return Html("".join(joined(child) for child in children))


def escaped(text: str) -> str:
    """Text for an element or a quoted attribute: no markup, no characters that HTML forbids, no lone surrogates."""
    valid = text.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files need not be valid text
    return html.escape(_FORBIDDEN.sub("\ufffd", valid), quote=True)


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
