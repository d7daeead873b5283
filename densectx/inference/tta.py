"""Self-ensemble: the answers to turned, mirrored or resized views of a picture, averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.inference.tiler import Answers
from densectx.tasks.base import Task


class View(NamedTuple):
    """A picture as the model sees it: resized, then mirrored, then turned.

    Attributes:
        scale: size of the view / size of the picture.
        mirrored: whether left and right are exchanged.
        turns: quarter turns counter-clockwise.
    """

    scale: float = 1.0
    mirrored: bool = False
    turns: int = 0


TURNED: Final = tuple(View(1.0, mirrored, turns) for mirrored in (False, True) for turns in range(4))
"""The self-ensemble of restoration (Timofte et al., Seven ways to improve example-based single image super
resolution, CVPR 2016, section 3.6)."""

MIRRORED: Final = (View(), View(1.0, True))
"""For other pictures and values: upright, as photographs are and as augmentation by ``flip`` shows them to a model."""

RESIZED: Final = tuple(View(scale, mirrored) for scale in (0.75, 1.0, 1.25) for mirrored in (False, True))
"""For classes: upright, as photographs are."""


def views_of(task: Task, key: str) -> tuple[View, ...]:
    """The views that a task's answers are averaged over, by its kind of output.

    :data:`RESIZED` for classes and labels, :data:`TURNED` for what is restored, :data:`MIRRORED` for the rest.

    Raises:
        ConfigError: the task's answer does not turn with its picture.
    """
    if not task.turns:
        raise ConfigError(
            f"--tta: a mirrored picture does not have the mirrored answer for task {key!r} (a mosaic then begins with"
            " another colour, components of vectors change their sign); leave --tta away, or choose other --tasks."
        )
    if task.output in ("classes", "labels"):
        return RESIZED
    return TURNED if task.output == "restored" else MIRRORED


def averaged(run: Callable[[Tensor], Answers], image: Tensor, views: Sequence[View]) -> Answers:
    """The mean of the answers to some views, each turned back and resized to the answer to the picture itself.

    Views and answers are resized bilinearly with antialiasing: probabilities stay probabilities.

    Args:
        run: (C, h, w) or (B, C, h, w) -> {task: (..., K, h * scale, w * scale)}.
        image: (C, H, W) or (B, C, H, W).
        views: the views; one of them at scale 1.
    """
    height, width = image.shape[-2:]
    sums: Answers = {}
    for view in sorted(views, key=lambda view: view.scale != 1):  # first those that tell the answers' size
        answers = run(_seen(view, image, height, width))
        for key, value in answers.items():
            upright = torch.rot90(value, -view.turns, (-2, -1))
            upright = upright.flip(-1) if view.mirrored else upright
            sums[key] = sums[key] + _resized(upright, *sums[key].shape[-2:]) if key in sums else upright
    return {key: value / len(views) for key, value in sums.items()}


def _seen(view: View, image: Tensor, height: int, width: int) -> Tensor:
    sides = (max(round(size * view.scale), 1) for size in (height, width))
    resized = _resized(image, *sides)
    return torch.rot90(resized.flip(-1) if view.mirrored else resized, view.turns, (-2, -1)).contiguous()


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) or (B, C, H, W) -> (..., height, width); itself if it has that size."""
    if image.shape[-2:] == (height, width):
        return image
    batch = image if image.ndim == 4 else image[None]
    resized = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return resized if image.ndim == 4 else resized[0]
