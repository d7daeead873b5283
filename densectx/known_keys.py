"""The keys that a config may have, for every command that reads one."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Final

import pytorch_lightning as pl

from densectx.arguments import TOP_LEVEL
from densectx.config import Composed, check_keys
from densectx.data.module import DATA_KEYS
from densectx.model import MODEL_KEYS

TRAINING_KEYS: Final = (
    "optimizer", "lr_scheduler", "balancing", "freeze", "cache_features", "param_groups", "channels_last", "compile",
)  # fmt: skip
"""The keys of a config's ``model`` that say how it is trained; :data:`MODEL_KEYS` are the others."""


def known_keys() -> dict[str, Collection[str]]:
    """By part of a config the keys that it may have."""
    return {
        "model": ("name", *MODEL_KEYS, *TRAINING_KEYS),
        "data": DATA_KEYS,
        "trainer": set(inspect.signature(pl.Trainer).parameters),
    }


def check_known_keys(composed: Composed) -> None:
    """Refuse keys that no config has; what ``${...}`` stands for is looked at later.

    Raises:
        ConfigError: an unknown key, with its place and the nearest one.
    """
    check_keys(composed.values, TOP_LEVEL, "", composed)
    for key, names in known_keys().items():
        if isinstance(part := composed.values.get(key), Mapping):
            check_keys(part, names, key, composed)
