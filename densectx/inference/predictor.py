"""A model with everything that its answers depend on: tasks, options, device, precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from densectx.errors import ConfigError, unknown
from densectx.inference.tiler import Tile, check_paper, default_tile, paper_tiles
from densectx.model import DenseModel
from densectx.tasks.base import Options

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
_PROBE = 16  # pixels of the side of the image that is predicted before any work, to find what cannot work


@final
class Predictor:
    """A model with everything that its answers depend on.

    Args:
        model: the model; moved to the device.
        tasks: keys, None for all.
        options: run-time options.
        device: a device of torch.
        precision: ``"32"`` or ``"bf16"``.
        tile: how large images are taken, None for what the model is made for, see
            :func:`densectx.inference.tiler.default_tile`.

    Attributes:
        tasks: keys in the model's order.
        tile: how large images are taken.
        shapes: of the answers to a small gray image, by task.

    Raises:
        ConfigError: an unknown or missing task or option.
    """

    def __init__(
        self,
        model: DenseModel,
        tasks: Sequence[str] | None,
        options: Mapping[str, float],
        device: torch.device,
        precision: str,
        tile: Tile | None = None,
    ) -> None:
        for key in tasks or ():
            if key not in model.tasks:
                raise ConfigError(f"--tasks: {unknown('task', key, model.tasks)}")
        self.tasks = [key for key in model.tasks if tasks is None or key in tasks]
        for name in options:
            if (key := name.partition(".")[0]) in model.tasks and key not in self.tasks:
                raise ConfigError(f"--set {name}: {key!r} is not one of --tasks {','.join(self.tasks)}.")
        self.model, self.options = model.to(device), dict(options)
        self.device, self.precision = device, precision
        self.tile = tile or default_tile(model)
        if self.tile == "paper":
            check_paper(model, self.tasks)
        self.shapes = {key: tuple(answer.shape) for key, answer in self._whole(torch.zeros(1, _PROBE, _PROBE)).items()}

    def resolve(self, image: Tensor) -> dict[str, float | Tensor | None]:
        """The run-time options for an image; those that were estimated from it are tensors (1,)."""
        return self.model.resolve(image, self.tasks, self.options)

    def __call__(self, image: Tensor, options: Options | None = None) -> dict[str, Tensor]:
        """(C, H, W) float32 on the CPU -> {task: what ``DenseModel.predict`` returns}.

        Args:
            image: the image.
            options: of this image, as :meth:`resolve` found them; None finds them again.
        """
        if self.tile == "whole":
            return self._whole(image, options)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return paper_tiles(self.model, image, self.tasks)

    def _whole(self, image: Tensor, options: Options | None = None) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model.predict(image, self.tasks, self.options if options is None else options)


def device_of(name: str) -> torch.device:
    """The device of a name; ``auto`` is cuda where there is one, else cpu.

    Raises:
        ConfigError: unknown, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in DEVICES[1:]:
        raise ConfigError(f"--device: {unknown('device', name, DEVICES)}")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name}: is not available here ({str(error).splitlines()[0]}).") from None
    return device
