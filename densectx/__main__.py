"""``python -m densectx``."""

from __future__ import annotations

import sys

from densectx.cli import main

if __name__ == "__main__":
    sys.exit(main())
