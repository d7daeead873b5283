"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any


def number(value: float) -> str:
    """Two decimals, or four digits where those would say less: 29.50, 0.1771; a dash for what is not known."""
    if math.isnan(value):
        return "\N{EN DASH}"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    text = f"{value:.2f}" if 10 <= abs(value) < 1e6 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text


def percent(value: float) -> str:
    """One decimal, for columns: 8.2; a dash for what is not known."""
    return "\N{EN DASH}" if math.isnan(value) else f"{value:.1f}"


def difference(value: float, other: float) -> str:
    """What a number has more than another one, with its sign, and as many decimals as the numbers are read with."""
    change = value - other
    text = f"{change:+.2f}" if max(abs(value), abs(other)) >= 10 else f"{change:+.3g}"
    return number(change) if math.isnan(change) else text.replace("-", "\N{MINUS SIGN}", 1)


def grouped(value: int) -> str:
    """Thousands apart: 11 173 962."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def size(count: int) -> str:
    """Bytes: 11.8 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def plain(value: Any) -> str:
    """A value of a config as YAML would have it on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(plain, value)) + "]"
    return str(value)
