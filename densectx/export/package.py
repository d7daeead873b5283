"""Models as native code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from densectx.errors import ConfigError, unknown


@final
class Package:
    """A file of ``densectx export -f aoti``: an image to its answers, by native code.

    The code does not look at what it is given: an image of other channels, or with its numbers in another order in
    memory, would be read wrongly or beyond its end. So it is called through this class, which looks.

    Loading runs what is in the file: open only files that you trust as you trust a program.

    Args:
        path: the file.

    Attributes:
        about: what the file says of itself: ``image``, ``options``, ``tasks`` with class names and palette.
    """

    def __init__(self, path: str | Path) -> None:
        self._run = torch._inductor.aoti_load_package(str(path))
        self.about = json.loads(self._run.get_metadata()["densectx"])

    def __call__(self, image: Tensor, options: Mapping[str, float | Tensor] | None = None) -> dict[str, Tensor]:
        """Answer for an image.

        Args:
            image: (B, C, H, W) float32 on the CPU, sRGB 0..1, every side at least 1.
            options: ``{"denoising.sigma": 25.0}``; what is left out is the default, or estimated in the image.

        Returns:
            What :meth:`densectx.model.DenseModel.predict` returns.

        Raises:
            ConfigError: another shape, type or device, or an unknown option.
        """
        channels, known = self.about["image"]["channels"], self.about["options"]
        if image.ndim != 4 or image.shape[1] != channels or 0 in image.shape:
            raise ConfigError(f"an image of shape {tuple(image.shape)}; expected (B, {channels}, H, W), not empty.")
        if image.dtype != torch.float32 or image.device.type != "cpu":
            raise ConfigError(f"an image of {image.dtype} on {image.device}; expected float32 on the CPU.")
        for name in options or ():
            if name not in known:
                raise ConfigError(unknown("option", name, known))
        values = [(options or {}).get(name, entry["default"]) for name, entry in known.items()]
        scalars = [torch.as_tensor(-1.0 if v is None else v, dtype=torch.float32).reshape(()) for v in values]
        found: dict[str, Tensor] = self._run(image.contiguous(), *scalars)
        return found
