"""A model with everything that its answers depend on: tasks, options, device, precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from densectx.errors import ConfigError, DataError, unknown
from densectx.inference.tiler import Setting, Sink, Source
from densectx.inference.tiling import Tiling
from densectx.inference.tta import View, averaged, views_of
from densectx.model import DenseModel
from densectx.tasks.base import Options
from densectx.types import SourceInfo

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
_PROBE = 16  # pixels of the side of the image that is predicted before any work, to find what cannot work


@final
class Predictor:
    """A model with everything that its answers depend on.

    Args:
        model: the model; moved to the device, its tasks' metrics apart.
        tasks: keys, None for all.
        options: run-time options.
        device: a device of torch.
        precision: ``"32"`` or ``"bf16"``.
        tile: how large images are taken.
        say: takes a line for the user.
        tta: whether answers are averaged over views, see :mod:`densectx.inference.tta`.
        ids: whether of up to 256 classes only the most probable ones are kept, which takes little memory; without
            ``tta``.
        sharing: processes that take memory of the same device.

    Attributes:
        tasks: keys in the model's order.
        tiling: how large images are taken.
        shapes: of the answers to a small gray image, by task.

    Raises:
        ConfigError: an unknown or missing task or option; a task whose answer does not turn, with ``tta``.
    """

    def __init__(
        self,
        model: DenseModel,
        tasks: Sequence[str] | None,
        options: Mapping[str, float],
        device: torch.device,
        precision: str,
        tile: Setting = Setting(),  # noqa: B008 - frozen
        say: Callable[[str], None] = lambda line: None,
        *,
        tta: bool = False,
        ids: bool = False,
        sharing: int = 1,
    ) -> None:
        for key in tasks or ():
            if key not in model.tasks:
                raise ConfigError(f"--tasks: {unknown('task', key, model.tasks)}")
        self.tasks = [key for key in model.tasks if tasks is None or key in tasks]
        for name in options:
            if (key := name.partition(".")[0]) in model.tasks and key not in self.tasks:
                raise ConfigError(f"--set {name}: {key!r} is not one of --tasks {','.join(self.tasks)}.")
        self.model, self.options = _moved(model, device).eval(), dict(options)
        self.device, self.precision = device, precision
        if precision == "bf16" and tile.mode == "paper":
            raise ConfigError(
                "--precision bf16: published tiles are taken in float32; leave it out or take --tile whole."
            )
        published = precision != "bf16"
        classes = _classes(self.model, self.tasks) if ids else {}
        self.tiling = Tiling(
            self.model, self.tasks, tile, self._whole, say, sharing, published=published, classes=classes
        )
        by_views: dict[tuple[View, ...], list[str]] = {}
        for key in self.tasks if tta else ():
            by_views.setdefault(views_of(model.task(key), key), []).append(key)
        self._ensemble = [
            (views, Tiling(self.model, keys, tile, partial(self._whole, tasks=keys), say, sharing, published=published))
            for views, keys in by_views.items()
        ]
        self.shapes = self.probe(1)

    def probe(self, channels: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the answers to a small black image of so many channels, by task."""
        answers = self._whole(torch.zeros(channels, _PROBE, _PROBE), self.options)
        return {key: tuple(answer.shape) for key, answer in answers.items()}

    def resolve(self, image: Tensor) -> dict[str, float | Tensor | None]:
        """The run-time options for an image; those that were estimated from it are tensors (1,)."""
        return self.model.resolve(image, self.tasks, self.options)

    def __call__(self, image: Tensor, options: Options | None = None) -> dict[str, Tensor]:
        """(C, H, W) or (B, C, H, W) float32 on the CPU -> {task: what ``DenseModel.predict`` returns}.

        With ``ids`` classes are (1, H, W) uint8, batched as the image.

        Args:
            image: the image, or several of one size.
            options: of this image, as :meth:`resolve` found them; None finds them again. All views of an image have
                the same.
        """
        options = self.resolve(image) if options is None else options
        if not self._ensemble:
            return self.tiling(image, options)
        found: dict[str, Tensor] = {}
        for views, tiling in self._ensemble:
            found |= averaged(partial(tiling, options=options), image, views)
        return {key: found[key] for key in self.tasks}

    def check_windows(self, path: Path) -> None:
        """Whether a picture may be read in parts.

        Raises:
            DataError: not by an ensemble, whose views are turned as a whole, nor where ``--tile`` asks for the whole
                or for the published tiles, which are cut from the whole.
        """
        if (mode := self.tiling.setting.mode) in ("whole", "paper"):
            raise DataError(
                f"{path}: is too large to be read as a whole, as --tile {mode} does; take --tile exact for it (or"
                " --tile N, blended windows), or cut it."
            )
        if self._ensemble:
            raise DataError(f"{path}: is too large to be read as a whole, as --tta does; leave --tta away for it.")

    def stream(self, source: Source, sinks: Mapping[str, Sink], options: Options) -> dict[str, float]:
        """Answer for a picture that is read in parts, see :meth:`densectx.inference.tiling.Tiling.stream`."""
        return self.tiling.stream(source, sinks, options)

    def _whole(self, image: Tensor, options: Options, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model.predict(image, self.tasks if tasks is None else tasks, options)


def _classes(model: DenseModel, tasks: Sequence[str]) -> dict[str, int]:
    """Numbers of classes of the tasks that answer with up to 256 of them."""
    sources = model.config.get("sources", {})
    asked = {key: model.task(key) for key in tasks}
    infos = {k: SourceInfo.from_config(sources.get(t.source, {})) for k, t in asked.items() if t.output == "classes"}
    return {key: len(info.classes) for key, info in infos.items() if len(info.classes) <= 256}


def _moved(model: DenseModel, device: torch.device) -> DenseModel:
    """The model on a device; what its tasks count in stays where it is: sums are float64, which MPS does not have."""
    tasks = [model.task(key) for key in model.tasks]
    metrics = [task.metrics for task in tasks]
    for task in tasks:
        del task.metrics
    try:
        return model.to(device)
    finally:
        for task, kept in zip(tasks, metrics, strict=True):
            task.metrics = kept


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
