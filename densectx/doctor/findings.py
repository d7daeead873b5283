"""What was looked at, how it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final


@final
@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Attributes:
        subject: what was looked at.
        text: how it is.
        level: ``ok``; ``warning``: training works, but slower or less safely than it could; ``problem``: it fails.
        fix: what to do, empty where nothing is wrong.
        status: exit status of a problem, as ``densectx.errors`` numbers them.
    """

    subject: str
    text: str
    level: Literal["ok", "warning", "problem"] = "ok"
    fix: str = ""
    status: int = 0

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return asdict(self)


def worst(findings: Iterable[Finding]) -> int:
    """Exit status: that of the first problem, 0 without one."""
    return next((found.status for found in findings if found.level == "problem"), 0)


def lines(findings: Sequence[Finding]) -> list[str]:
    """One line each, the fix below."""
    width = max(len(found.subject) for found in findings)
    text = []
    for found in findings:
        text.append(f"{found.level:<8} {found.subject:<{width}}  {found.text}")
        if found.fix:
            text.append(f"{'':<8} {'':<{width}}  -> {found.fix}")
    return text
