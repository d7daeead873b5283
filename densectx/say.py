"""What a run tells beside its results: lines on stderr, of the first rank alone."""

from __future__ import annotations

import sys

from densectx.runs import first_rank


def warn(text: str) -> None:
    """One line that no filter of warnings hides."""
    if first_rank():
        sys.stderr.write(f"densectx: warning: {text}\n")
