"""Run-time options of a task for the images at hand: given, default, or estimated."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.tasks.base import Options, Task


def resolved(task: Task, given: Options, image: Tensor, key: str) -> dict[str, float | Tensor | None]:
    """Every option of a task for a batch of images.

    Args:
        task: the task.
        given: some of its options: a number for all images, a tensor of one an image (or of one for all), or None.
        image: (B, C, H, W) float32, what estimators look at.
        key: the task's key, for messages.

    Returns:
        ``{option: value}``: what is given, else the default, as it is; where an estimator answers for the option and
        the value is None or negative, a (B,) float32 tensor with the estimates in the place of those.

    Raises:
        ConfigError: no number, or a tensor that does not have one number an image.
    """
    found: dict[str, float | Tensor | None] = {}
    for option, default in task.options.items():
        value = given.get(option, default)
        if not _possible(value):
            raise ConfigError(
                f"option {key}.{option}: {value!r} is no number; expected one, as 25.0, or a tensor of one an image."
            )
        if isinstance(value, Tensor):
            value = _one_an_image(f"{key}.{option}", value, image)
        estimator = task.estimators.get(option)
        if estimator is not None and (value is None or isinstance(value, Tensor) or value < 0):
            estimate = estimator(image).float()
            value = torch.where(value < 0, estimate, value) if isinstance(value, Tensor) else estimate
        found[option] = value
    return found


def repeated(options: Options, times: int) -> Options:
    """The options of a batch in which every image is taken apart into so many."""
    if times == 1:
        return options
    return {k: v.repeat_interleave(times) if isinstance(v, Tensor) else v for k, v in options.items()}


def one_of(options: Options, number: int) -> dict[str, float | Tensor | None]:
    """The options of one image of a batch."""
    return {k: v[number : number + 1] if isinstance(v, Tensor) else v for k, v in options.items()}


def grouped(options: Options) -> dict[str, dict[str, float | Tensor | None]]:
    """``{"denoising.sigma": 25}`` as ``{"denoising": {"sigma": 25}}``."""
    found: dict[str, dict[str, float | Tensor | None]] = {}
    for name, value in options.items():
        key, _, option = name.rpartition(".")
        found.setdefault(key, {})[option] = value
    return found


def flat(options: Mapping[str, Options]) -> dict[str, float | Tensor | None]:
    """The inverse of :func:`grouped`."""
    return {f"{key}.{option}": value for key, some in options.items() for option, value in some.items()}


def _possible(value: object) -> bool:
    return value is None or (isinstance(value, Real | Tensor) and not isinstance(value, bool))


def _one_an_image(name: str, value: Tensor, image: Tensor) -> Tensor:
    if value.ndim > 1 or value.numel() not in (1, image.shape[0]):
        raise ConfigError(f"option {name}: a tensor of shape {tuple(value.shape)} for {len(image)} images.")
    return value.to(image.device, torch.float32).expand(image.shape[0])
