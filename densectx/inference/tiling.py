"""Which windows a model takes a picture in: what was asked for, what its field allows, what the memory holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Final, cast, final

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
    check_setting,
    class_ids,
    plan_blend,
    plan_exact,
    plan_whole,
    run_exact,
)
from densectx.inference.windows import Halo, least_side
from densectx.inspection.cost import numbers
from densectx.inspection.geometry import LayerField, geometry
from densectx.inspection.halo import with_trunk
from densectx.model import DenseModel
from densectx.tasks.base import Options
from densectx.tasks.options import flat, one_of

_SMALL: Final = 1 << 20  # pixels that are taken at once without a thought
_SHARE: Final = 0.5  # of the free memory that a pass may take
_MOST: Final = 1 << 30  # bytes of a window's pass, so that one picture does not take all memory; more for wide fields
_STREAMED: Final = 1 << 29  # the same for a picture that is read by windows
_HOST: Final = torch.device("cpu")  # whose memory whole answers lie in
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
        sharing: processes that take memory of the same device.
        published: whether published tiles are the default for the networks that have them.
        classes: number of classes of the tasks whose answers are kept as the most probable ones, at most 256.

    Attributes:
        step: pixels at whose multiples windows start: there the model's grid begins anew, and so does what the tasks
            make of a picture (:attr:`densectx.tasks.base.Task.period`).

    Raises:
        ConfigError: ``exact`` where the field is infinite (the layer is named), ``paper`` for other networks, a side
            that is no multiple of the step.
    """

    def __init__(
        self,
        model: DenseModel,
        tasks: Sequence[str],
        setting: Setting,
        run: Callable[[Tensor, Options], Answers],
        say: Callable[[str], None] = lambda line: None,
        sharing: int = 1,
        *,
        published: bool = True,
        classes: Mapping[str, int] | None = None,
    ) -> None:
        self.classes = dict(classes or {})
        self.model, self.tasks, self._run, self.say, self._sharing = model, list(tasks), run, say, sharing
        self.channels = max(model.channels(key) for key in self.tasks)
        published = published and setting.mode is None and default_paper(model, self.tasks)
        self.setting = Setting("paper") if published else setting
        if self.setting.mode == "paper":
            check_paper(model, self.tasks)
        self.step = math.lcm(model.stride, *(model.task(key).period for key in self.tasks))
        check_setting(self.setting, self.step)
        if self.setting.mode == "exact" and self.halo is None:
            raise ConfigError(
                f"--tile exact: {self._why()}; take --tile whole, or a number of pixels for blended windows."
            )
        self.device = next(model.parameters()).device
        self.scales = {key: model.task(key).scale for key in self.tasks}
        self._said: set[str] = set()

    def __call__(self, image: Tensor, options: Options) -> Answers:
        """(C, H, W) float32 on the CPU -> {task: (K, H * scale, W * scale)} as ``DenseModel.predict`` returns it.

        Those of ``classes`` are (1, H * scale, W * scale) uint8. A batch (B, C, H, W) goes through the model together
        where its pictures are taken as a whole.

        Raises:
            MemoryLimitError: the answers, or the smallest windows, are too large.
            NumericError: an answer that is one of ``classes`` is not finite.
        """
        height, width = image.shape[-2:]
        images = image.shape[0] if image.ndim == 4 else 1
        self._check_answers(height, width, images)
        plan = self.plan(height, width, images=images)
        if image.ndim == 4 and (plan.mode == "paper" or plan.windows > 1):
            return self._each(image, options)
        if plan.mode == "paper":
            return self._reduced(paper_tiles(self.model, image, self.tasks))
        if plan.windows == 1:
            try:
                return self._reduced(self._run(image, options))
            except (MemoryError, RuntimeError) as error:
                if image.ndim == 4 and out_of_memory(error):
                    return self._each(image, options)
                plan = self._smaller(plan, height, width, error)
        sinks = {k: Kept(height * f, width * f, self.classes.get(k, 0)) for k, f in self.scales.items()}
        self.stream(Held(image), sinks, options, plan)
        return {key: sink.value for key, sink in sinks.items()}

    def _each(self, batch: Tensor, options: Options) -> Answers:
        """The pictures of a batch one by one."""
        answers = [self(image, one_of(options, number)) for number, image in enumerate(batch)]
        return {key: torch.stack([answer[key] for answer in answers]) for key in self.tasks}

    def _reduced(self, answers: Answers) -> Answers:
        return {key: class_ids(value, self.classes.get(key, 0)) for key, value in answers.items()}

    def _check_answers(self, height: int, width: int, images: int) -> None:
        """Refuse a picture whose answers do not fit into memory, before hours of windows.

        Raises:
            MemoryLimitError: see :meth:`__call__`.
        """
        pixels = images * height * width
        if pixels <= _SMALL:
            return
        needed, free = self._answer_bytes * pixels, free_bytes(_HOST) / self._sharing
        if needed > free:
            raise MemoryLimitError(
                f"the answers to {height}x{width} pixels take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are"
                " free; take fewer --tasks at a time, leave --raw and --tta away (of classes only the most probable"
                " ones are kept then), or cut the picture."
            )

    @cached_property
    def _answer_bytes(self) -> float:
        """Of what is kept of the answers, for each pixel of a picture."""
        answers = self._reduced(self._run(torch.zeros(self._most_channels, self.step, self.step), self._numbers))
        return sum(answer.nbytes for answer in answers.values()) / self.step**2

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

    def plan(self, height: int, width: int, *, whole: bool = True, images: int = 1) -> Plan:
        """The windows for a size.

        Exact windows are worth their work where they keep about half of each side, that is, 4 times the pixels of the
        picture go through the model. Where memory is too small for that, blended ones are taken unless ``exact`` was
        asked for, which goes on to 25 times.

        Args:
            height: of the picture.
            width: of the picture.
            whole: whether it may be taken as a whole where its pass fits into memory.
            images: of this size, which go through the model together where they are taken as a whole.

        Raises:
            MemoryLimitError: ``exact`` was asked for and its windows do not fit into memory.
        """
        mode, side = self.setting.mode, self.setting.side
        one = plan_whole(height, width)
        if mode in ("whole", "paper"):
            return Plan(mode, one.rows, one.columns)
        if mode == "blend" and side is not None:
            return one if max(height, width) <= side else plan_blend(height, width, side, self.step)
        pixels = images * height * width
        if mode is None and whole and (pixels <= _SMALL or self._bytes * pixels <= self._room()):
            return one
        core = None if self.halo is None else side or self._core(height, width, _MOST if whole else _STREAMED)
        if self.halo is not None and core is not None:
            return plan_exact(height, width, self.halo, core, self.step)
        return plan_blend(height, width, self._blended(), self.step)

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
        """Of each task's answer, with the trunk of an ablated model."""

        def run(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
            answers = cast("DenseModel", with_trunk(model)).predict(x, self.tasks, self._numbers)
            return [answers[key] for key in self.tasks]

        return geometry(self.model, (1, self._most_channels, self.step, self.step), run).outputs

    @cached_property
    def _numbers(self) -> dict[str, float | Tensor | None]:
        """Run-time options as numbers: nothing is estimated in a picture that only tells sizes."""
        return flat({key: numbers(self.model.task(key)) for key in self.tasks})

    @property
    def _most_channels(self) -> int:
        """Of a picture; a gray model takes those of colours at once, and enlarges their chroma bicubically."""
        return 3 if self.channels == 1 else self.channels

    def _why(self) -> str:
        causes = [cause for field in self._fields if field is not None for cause in field.causes]
        return f"layer {causes[0]!r} sees the whole picture" if causes else "the model sees the whole picture"

    @cached_property
    def _bytes(self) -> float:
        """Of memory, for each pixel of a pass."""
        return bytes_per_pixel(lambda image: self._run(image, self._numbers), self._most_channels, self.device)

    def _room(self) -> float:
        return _SHARE * free_bytes(self.device) / self._sharing

    @cached_property
    def _around(self) -> int:
        """Pixels of a window's side that are seen and not kept, on both sides together; 0 without a halo."""
        halo = self.halo or Halo(0, 0, 0, 0)
        return max(halo.top + halo.bottom, halo.left + halo.right)

    @cached_property
    def _least(self) -> int:
        """The smallest side of what is kept that an exact window is worth.

        Automatic: as much as is not kept. Asked for: a quarter of it; below, windows hardly get smaller, only more.
        """
        worth = self._around if self.setting.mode is None else self._around // 4
        return max(-(-worth // self.step), 1) * self.step

    def _core(self, height: int, width: int, most: int) -> int | None:
        """The side of what is kept of an exact window, at least half the window's where memory allows that.

        Args:
            height: of the picture.
            width: of the picture.
            most: bytes that the window's pass may take, unless half its side would not be kept then.

        Returns:
            A multiple of the step; None where blended windows are better.

        Raises:
            MemoryLimitError: see :meth:`plan`.
        """
        room, step, around = self._room(), self.step, self._around
        half = max(-(-around // step), 1) * step
        core = max((self._side(min(room, most)) - around) // step * step, half)
        seen = min(core + around, height) * min(core + around, width)
        if seen <= _SMALL or self._bytes * seen <= room:
            return core
        core = (self._side(room) - around) // step * step
        if core >= self._least:
            return core
        if self.setting.mode is None:
            self._tell(f"exact windows of {half + around} pixels do not fit into memory: blended ones are taken.")
            return None
        raise MemoryLimitError(
            f"--tile exact: the memory is too small for windows of {self._least + around} pixels, {around} of which are"
            " not kept; free some, take another --device, or --tile N for blended windows."
        )

    def _side(self, room: float) -> int:
        """The side of a square picture whose pass takes so many bytes."""
        return math.isqrt(int(room / self._bytes))

    def _blended(self) -> int:
        side = min(_BLEND, self._side(min(self._room(), _MOST)))
        return max(side // self.step * self.step, least_side(self.step))

    def _smaller(self, plan: Plan, height: int, width: int, error: BaseException) -> Plan:
        """The same with windows of half the side, blended where exact ones are not worth it; raises other errors again.

        Raises:
            MemoryLimitError: windows cannot be smaller.
        """
        if not out_of_memory(error):
            raise error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        kept = _kept(plan)
        smaller = None if self.setting.mode == "whole" else self._halved(plan, height, width)
        if smaller is None:
            raise MemoryLimitError(
                f"the memory is too small for a window of {kept} pixels; free some, or take another --device."
            ) from error
        self.say(f"densectx: a window of {kept} pixels does not fit into memory; {_kept(smaller)} pixels are tried.")
        return smaller

    def _halved(self, plan: Plan, height: int, width: int) -> Plan | None:
        """Windows of which half as much is kept; None where that does not help any more."""
        half = _kept(plan) // 2 // self.step * self.step
        if self.halo is not None and "blend" not in (plan.mode, self.setting.mode):
            core = half
            while core >= self._least:
                smaller = plan_exact(height, width, self.halo, core, self.step)
                if smaller.windows > 1:
                    return smaller
                core = core // 2 // self.step * self.step  # every window would be the picture again
            if self.setting.mode == "exact":
                return None
            half = min(half, self._blended())
        return plan_blend(height, width, half, self.step) if half >= least_side(self.step) else None

    def _tell(self, line: str) -> None:
        """Once: folders hold many pictures of one size."""
        if line not in self._said:
            self._said.add(line)
            self.say(f"densectx: {line}")


def _kept(plan: Plan) -> int:
    """The longest side of what is kept of a window."""
    sides: list[int] = [line.kept.stop - line.kept.start for line in (*plan.rows, *plan.columns)]
    return max(sides)
