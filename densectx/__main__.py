"""``python -m densectx``."""

from __future__ import annotations

from densectx.cli import run

if __name__ == "__main__":
    run()
