"""The one place where product code hurts itself, for tests: ``DENSECTX_FAULT=save:STAGE[:N]``."""

from __future__ import annotations

import os
import signal
from collections import Counter

from densectx.errors import ConfigError, unknown

STAGES = ("before-temp", "half-temp", "before-fsync", "before-replace", "before-link", "before-prune")
"""Of a save, in the order in which it passes them; ``before-prune`` only where a file is to be removed."""

_passed: Counter[str] = Counter()


def fault(stage: str) -> None:
    """Kill this process with SIGKILL the N-th time (default: the first) that it comes to the named stage.

    Without the environment variable nothing happens.

    Raises:
        ConfigError: the variable is set, but names no stage.
    """
    wanted = os.environ.get("DENSECTX_FAULT")
    if not wanted:
        return
    kind, _, rest = wanted.partition(":")
    name, _, nth = rest.partition(":")
    if kind != "save" or name not in STAGES or not (nth or "1").isdecimal():
        raise ConfigError(f"DENSECTX_FAULT={wanted}: expected save:STAGE[:N]; {unknown('stage', name, STAGES)}")
    _passed[stage] += 1
    if stage == name and _passed[stage] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)
