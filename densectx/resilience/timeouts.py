"""How long ranks wait for each other: two environment variables."""

from __future__ import annotations

import os
from typing import Final

import pytorch_lightning as pl

from densectx.errors import ConfigError

TIMEOUT: Final = "DENSECTX_TIMEOUT"
"""Environment variable: seconds that a rank waits for the others in a collective."""

START: Final = "DENSECTX_START_TIMEOUT"
"""Environment variable: seconds within which all ranks have to meet."""


def collective_timeout() -> float:
    """Seconds, 300 by default.

    Raises:
        ConfigError: the variable is no such number.
    """
    return _seconds(TIMEOUT, 300)


def start_timeout(trainer: pl.Trainer) -> float:
    """Seconds: 20 by default, 60 where this process starts the others, which have yet to import everything."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    starts = environment is not None and not environment.creates_processes_externally
    return _seconds(START, 60 if starts else 20)


def _seconds(name: str, usual: float) -> float:
    given = os.environ.get(name) or usual
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{name}: expected a number of seconds above 0, got {given!r} (environment variable).")
    return seconds
