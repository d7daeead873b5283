"""Which windows a model takes a picture in: what was asked for, what its field allows, what the memory holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Final, final

import torch
from torch import Tensor

from densectx.errors import ConfigError, MemoryLimitError
from densectx.inference.blend import run_blended
from densectx.inference.memory import bytes_per_pixel, free_bytes, out_of_memory
from densectx.inference.paper_tiles import check_paper, default_paper, paper_tiles
from densectx.inference.tiler import (
    Answers,
    Held,
    Kept,
    Plan,
    Run,
    Setting,
    Sink,
    Source,
    plan_blend,
    plan_exact,
    plan_whole,
    run_exact,
)
from densectx.inference.windows import Halo
from densectx.inspection.geometry import LayerField, geometry
from densectx.model import DenseModel
from densectx.tasks.base import Options
from densectx.tasks.options import one_of

_SMALL: Final = 1 << 20  # pixels that are taken as a whole without a thought
_SHARE: Final = 0.5  # of the free memory that a pass may take
_MOST: Final = 1 << 30  # bytes of a window's pass, so that one picture does not take all memory;
_STREAMED: Final = 1 << 29  # the same for a picture that is read by windows
_BLEND: Final = 512  # pixels of a blended window's side, unless memory allows less


@final
class Tiling:
    """How one model takes pictures for some tasks.

    Args:
        model: in evaluation mode, on its device.
        tasks: keys.
        setting: what was asked for.
        run: a whole pass: (image, options) -> answers.
        say: takes a line for the user.

    Raises:
        ConfigError: ``exact`` where the field is infinite (the layer is named), ``paper`` for other networks.
    """

    def __init__(
        self,
        model: DenseModel,
        tasks: Sequence[str],
        setting: Setting,
        run: Callable[[Tensor, Options], Answers],
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.tasks, self._run, self.say = model, list(tasks), run, say
        self.setting = Setting("paper") if setting.mode is None and default_paper(model) else setting
        if self.setting.mode == "paper":
            check_paper(model, self.tasks)
        if self.setting.mode == "exact" and self.halo is None:
            raise ConfigError(
                f"--tile exact: {self._why()}; take --tile whole, or a number of pixels for blended windows."
            )
        self.device = next(model.parameters()).device
        self.scales = {key: model.task(key).scale for key in self.tasks}
        self.channels = max(model.channels(key) for key in self.tasks)
        self._said: set[str] = set()

    def __call__(self, image: Tensor, options: Options) -> Answers:
        """(C, H, W) float32 on the CPU -> {task: (K, H * scale, W * scale)} as ``DenseModel.predict`` returns it.

        A batch (B, C, H, W) goes through the model together where its pictures are taken as a whole.
        """
        height, width = image.shape[-2:]
        plan = self.plan(height, width)
        if image.ndim == 4 and (plan.mode == "paper" or plan.windows > 1):
            return self._each(image, options)
        if plan.mode == "paper":
            return paper_tiles(self.model, image, self.tasks)
        if plan.windows == 1:
            try:
                return self._run(image, options)
            except (MemoryError, RuntimeError) as error:
                if image.ndim == 4 and out_of_memory(error):
                    return self._each(image, options)
                plan = self._smaller(plan, height, width, error)
        sinks = {key: Kept(height * scale, width * scale) for key, scale in self.scales.items()}
        self.stream(Held(image), sinks, options, plan)
        return {key: sink.value for key, sink in sinks.items()}

    def _each(self, batch: Tensor, options: Options) -> Answers:
        """The pictures of a batch one by one."""
        answers = [self(image, one_of(options, number)) for number, image in enumerate(batch)]
        return {key: torch.stack([answer[key] for answer in answers]) for key in self.tasks}

    def stream(
        self, source: Source, sinks: Mapping[str, Sink], options: Options, plan: Plan | None = None
    ) -> dict[str, float]:
        """Answer for a picture that is read in parts, into sinks; returns the seam errors of blended windows.

        Args:
            source: the picture.
            sinks: by task.
            options: resolved for the picture.
            plan: the windows; None for :meth:`plan`'s.

        Raises:
            MemoryLimitError: even the smallest window is too large.
        """
        _, height, width = source.shape
        plan = self.plan(height, width, whole=False) if plan is None else plan

        def run(image: Tensor) -> Answers:
            return self._run(image, options)

        while True:
            try:
                return self._once(run, source, sinks, plan)
            except (MemoryError, RuntimeError) as error:
                plan = self._smaller(plan, height, width, error)

    def _once(self, run: Run, source: Source, sinks: Mapping[str, Sink], plan: Plan) -> dict[str, float]:
        self._tell(f"a picture of {source.shape[1]}x{source.shape[2]} pixels is taken in windows: {plan}.")
        if plan.mode != "blend":
            run_exact(run, source, sinks, self.scales, plan)
            return {}
        seams = run_blended(run, source, sinks, self.scales, plan)
        for key, seam in seams.items():
            self._tell(f"{key}: neighbouring windows differ by up to {seam:.3g} where both see the picture.")
        return seams

    def plan(self, height: int, width: int, *, whole: bool = True) -> Plan:
        """The windows for a size.

        Args:
            height: of the picture.
            width: of the picture.
            whole: whether it may be taken as a whole where its pass fits into memory.
        """
        mode, side = self.setting.mode, self.setting.side
        one = plan_whole(height, width)
        if mode in ("whole", "paper"):
            return Plan(mode, one.rows, one.columns)
        if mode == "blend" and side is not None:
            return one if max(height, width) <= side else plan_blend(height, width, side, self.model.stride)
        if mode is None and whole and (height * width <= _SMALL or self._bytes * height * width <= self._room()):
            return one
        if self.halo is not None:
            core = side or self._core(self.halo, _MOST if whole else _STREAMED)
            return plan_exact(height, width, self.halo, core, self.model.stride)
        return plan_blend(height, width, self._blended(), self.model.stride)

    @cached_property
    def halo(self) -> Halo | None:
        """Pixels around a place that any answer there depends on; None where a task sees the whole picture."""
        sides: list[list[int]] = [[], []]
        for key, field in zip(self.tasks, self._fields, strict=True):
            if field is None:
                continue
            if field.causes or field.h is None or field.w is None:
                return None
            for side, extent in zip(sides, (field.h, field.w), strict=True):
                scale = self.model.task(key).scale
                side += [p // scale - first for p, first in enumerate(extent.first)]
                side += [last - p // scale for p, last in enumerate(extent.last)]
        # as far on both sides: at a border of the picture what is mirrored there lies on the other side
        tall, wide = (max([0, *side]) for side in sides)
        return Halo(tall, tall, wide, wide)

    @cached_property
    def _fields(self) -> list[LayerField | None]:
        """Of each task's answer, run-time options being numbers."""
        numbers = {f"{key}.{name}": 1.0 for key in self.tasks for name in self.model.task(key).options}
        channels = max(self.model.channels(key) for key in self.tasks)

        def run(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
            assert isinstance(model, DenseModel)
            answers = model.predict(x, self.tasks, numbers)
            return [answers[key] for key in self.tasks]

        # a gray model on colours enlarges chroma bicubically: three channels show that too
        shape = (1, 3 if channels == 1 else channels, self.model.stride, self.model.stride)
        return geometry(self.model, shape, run).outputs

    def _why(self) -> str:
        causes = [cause for field in self._fields if field is not None for cause in field.causes]
        return f"layer {causes[0]!r} sees the whole picture" if causes else "the model sees the whole picture"

    @cached_property
    def _bytes(self) -> float:
        """Of memory, for each pixel of a pass."""
        numbers = {f"{key}.{name}": 1.0 for key in self.tasks for name in self.model.task(key).options}
        return bytes_per_pixel(lambda image: self._run(image, numbers), self.channels, self.device)

    def _room(self) -> float:
        return _SHARE * free_bytes(self.device)

    def _core(self, halo: Halo, most: int) -> int:
        """The side of what is kept of a window, so that its pass fits into memory and into so many bytes."""
        side = math.isqrt(int(min(self._room(), most) / self._bytes))
        stride = self.model.stride
        return max((side - halo.top - halo.bottom) // stride * stride, stride)

    def _blended(self) -> int:
        stride = self.model.stride
        side = min(_BLEND, math.isqrt(int(min(self._room(), _MOST) / self._bytes)))
        return max(side // stride * stride, 2 * stride)

    def _smaller(self, plan: Plan, height: int, width: int, error: BaseException) -> Plan:
        """The same with windows of half the side; raises other errors again."""
        if not out_of_memory(error):
            raise error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        stride = self.model.stride
        kept = max(line.kept.stop - line.kept.start for line in (*plan.rows, *plan.columns))
        half = kept // 2 // stride * stride
        exact = self.halo is not None and self.setting.mode != "blend"
        if half < (stride if exact else 2 * stride) or self.setting.mode == "whole":
            raise MemoryLimitError(
                f"the memory is too small for a window of {kept} pixels; free some, or take another --device."
            ) from error
        self.say(f"densectx: a window of {kept} pixels does not fit into memory; {half} pixels are tried.")
        if exact and self.halo is not None:
            return plan_exact(height, width, self.halo, half, stride)
        return plan_blend(height, width, half, stride)

    def _tell(self, line: str) -> None:
        """Once: folders hold many pictures of one size."""
        if line not in self._said:
            self._said.add(line)
            self.say(f"densectx: {line}")
