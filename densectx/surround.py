"""Surroundings of pictures on their way through a model: see ``surround`` in :data:`densectx.types.Sample`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.tasks.base import Task
from densectx.types import Sample


def surround_of(sample: Sample, x: Tensor, key: str, source: str) -> int:
    """Pixels of a task's input on each side that are surroundings, 0 for none.

    Args:
        sample: collated.
        x: (B, C, H, W), what the task made of its image, which may be smaller or larger.
        key: of the task, for messages.
        source: of the sample, for messages.

    Raises:
        ConfigError: they are not the same in the whole batch, or no whole number of pixels of x.
    """
    if "surround" not in sample:
        return 0
    (border, *others), image = sorted(set(sample["surround"].flatten().tolist())), sample["image"]
    sizes = [(border * here, there) for here, there in zip(x.shape[-2:], image.shape[-2:], strict=True)]
    found = {scaled // there for scaled, there in sizes}
    if others or len(found) > 1 or any(scaled % there for scaled, there in sizes):
        raise ConfigError(
            f"task {key!r} takes images of {image.shape[-2]}x{image.shape[-1]} as {x.shape[-2]}x{x.shape[-1]}, in which"
            f" {border} pixels of surroundings are not the same whole number on each side; choose"
            f" data.sources.{source}.augment.surround and crop to fit, or leave surround out."
        )
    return int(found.pop())


def with_surround(output: Tensor, task: Task, surround: int) -> Tensor:
    """An output of the interior in the size of the task's target: zeros around it, where no target is known.

    Args:
        output: (B, K, H * f, W * f).
        task: f is its scale.
        surround: s, pixels of the task's input.

    Returns:
        (B, K, (H + 2 s) * f, (W + 2 s) * f).
    """
    return F.pad(output, (surround * task.scale // task.input_scale,) * 4)
