"""Augmentation that turns or mirrors a picture whose labels do not turn with it."""

from __future__ import annotations

from densectx.data.module import DataModule
from densectx.errors import ConfigError
from densectx.model import DenseModel

_TURNING = ("flip", "vertical_flip", "rotate90")


def check_turns(model: DenseModel, data: DataModule) -> None:
    """Refuse to learn from labels that augmentation makes wrong.

    A task that makes its target of the turned picture itself, as demosaicing does, needs no label of the source.

    Args:
        model: whose tasks say whether their answers may be turned (``Task.turns``).
        data: whose augmentation turns.

    Raises:
        ConfigError: a source mirrors or turns the target of a task that does not turn.
    """
    for key in model.tasks:
        task = model.task(key)
        augment = data.augments.get(task.source)
        if task.turns or "target" not in task.requires or augment is None:
            continue
        if on := [name for name in _TURNING if getattr(augment, name)]:
            raise ConfigError(
                f"task {key!r} learns from the target of this source, whose values have a direction (components of"
                f" vectors, say) and would be wrong in a mirrored or turned picture; leave out {' and '.join(on)}."
                " Where they have none a regression takes turns: true.",
                f"data.sources.{task.source}.augment",
            )
