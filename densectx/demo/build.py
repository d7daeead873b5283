"""A server with everything behind it, from what the command line says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from densectx.checkpoint import load
from densectx.demo.answers import Answering
from densectx.demo.describe import describe
from densectx.demo.jobs import Queue
from densectx.demo.server import Server
from densectx.demo.store import Store
from densectx.demo.uploads import Uploads
from densectx.errors import ConfigError, unknown
from densectx.inference.predictor import device_of
from densectx.inference.reading import Reading


class Limits(NamedTuple):
    """What the page takes.

    Attributes:
        megabytes: of a file, 10^6 bytes.
        megapixels: of a picture, 10^6 pixels.
        queue: pictures that may wait.
    """

    megabytes: float = 20.0
    megapixels: float = 40.0
    queue: int = 8


def build(
    name: str | Path, tasks: Sequence[str] | None = None, device: str = "auto", limits: Limits | None = None
) -> Server:
    """Load a model and put a server before it; its queue's thread runs from now on.

    Args:
        name: as for :func:`densectx.checkpoint.load`.
        tasks: keys to offer, None for all.
        device: as for :func:`densectx.inference.predictor.device_of`.
        limits: what is taken.

    Raises:
        ConfigError: an unknown task or device.
        CheckpointError, PluginError: the model cannot be loaded.
    """
    limits = limits or Limits()
    model, where = load(name), device_of(device)
    for key in tasks or ():
        if key not in model.tasks:
            raise ConfigError(f"--tasks: {unknown('task', key, model.tasks)}")
    keys = [key for key in model.tasks if tasks is None or key in tasks]
    uploads = Uploads(Reading.of(model, keys), round(limits.megabytes * 1e6), round(limits.megapixels * 1e6))
    store = Store()
    about = describe(_shown(name), model, keys, str(where), uploads)
    return Server(about, Queue(Answering(model, where, uploads, store), limits.queue), uploads, store)


def _shown(name: str | Path) -> str:
    """A name for people: the last parts of a path, since a run's folder is only a number, and never all of it."""
    parts = Path(name).parts[-2:] if Path(name).is_dir() else Path(name).parts[-1:]
    return "/".join(part for part in parts if part not in ("/", "..", "."))
