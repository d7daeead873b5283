"""densectx: multi-task dense prediction around one dilated context module. Importing it imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from densectx.registry import BACKBONES, BALANCING, CONTEXTS, DATASETS, HEADS, LOSSES, MODELS, TASKS

if TYPE_CHECKING:
    from densectx.checkpoint import load
    from densectx.data.module import DataModule
    from densectx.model import DenseModel
    from densectx.module import DenseModule

__all__ = [
    "BACKBONES",
    "BALANCING",
    "CONTEXTS",
    "DATASETS",
    "HEADS",
    "LOSSES",
    "MODELS",
    "TASKS",
    "DataModule",
    "DenseModel",
    "DenseModule",
    "load",
]

__version__ = "0.1.0"

_LAZY = {
    "DataModule": "densectx.data.module",
    "DenseModel": "densectx.model",
    "DenseModule": "densectx.module",
    "load": "densectx.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'densectx' has no attribute {name!r}")
