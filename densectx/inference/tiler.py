"""The tiler: one model on pictures of any size, in windows that give the answer of the whole picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, final

import torch
from torch import Tensor

from densectx.errors import ConfigError, NumericError
from densectx.inference.windows import (
    OVERLAP,
    Halo,
    Line,
    check_core,
    check_side,
    cost,
    exact_lines,
    grid,
    overlapping_lines,
)

Mode: TypeAlias = Literal["whole", "exact", "blend", "paper"]
Answers: TypeAlias = dict[str, Tensor]
Run: TypeAlias = Callable[[Tensor], Answers]


class Source(Protocol):
    """A picture that is read in parts."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    def read(self, rows: slice, columns: slice) -> Tensor:
        """(C, h, w) float32, sRGB 0..1."""


class Sink(Protocol):
    """Where the parts of an answer go, in any order; a part may come again, with the same numbers."""

    def write(self, rows: slice, columns: slice, part: Tensor) -> None:
        """(K, h, w) float32 on the CPU, at these rows and columns of the answer."""


@final
@dataclass(frozen=True)
class Held:
    """A picture in memory, (C, H, W), as a source."""

    image: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.image.shape
        return channels, height, width

    def read(self, rows: slice, columns: slice) -> Tensor:
        """A view."""
        return self.image[:, rows, columns]


@final
class Kept:
    """An answer in memory, as a sink.

    Args:
        height: H * scale.
        width: W * scale.
        classes: of which only the most probable ones are kept, see :func:`class_ids`; 0 for the answer as it is.

    Attributes:
        value: (K, H * scale, W * scale) float32, or (1, H * scale, W * scale) uint8.
    """

    value: Tensor

    def __init__(self, height: int, width: int, classes: int = 0) -> None:
        self.size, self.classes = (height, width), classes

    def write(self, rows: slice, columns: slice, part: Tensor) -> None:
        """Keep a part; the first one says how many channels there are."""
        part = class_ids(part, self.classes)
        if not hasattr(self, "value"):
            self.value = torch.empty(part.shape[0], *self.size, dtype=part.dtype)
        self.value[:, rows, columns] = part


def class_ids(value: Tensor, classes: int) -> Tensor:
    """The most probable class of every pixel: (..., K, h, w) -> (..., 1, h, w) uint8; as it is where K is not classes.

    Raises:
        NumericError: the answer is not finite.
    """
    if not classes or value.shape[-3] != classes:
        return value
    if not value.isfinite().all():
        raise NumericError("the model's answer is not finite (NaN or infinity).")
    return value.argmax(-3, keepdim=True).to(torch.uint8)


@final
@dataclass(frozen=True)
class Setting:
    """What ``--tile`` says.

    Attributes:
        mode: None for automatic.
        side: of the kept parts (exact) or of the windows (blend), in pixels, None for automatic.
    """

    mode: Mode | None = None
    side: int | None = None

    @classmethod
    def parse(cls, text: str | None) -> Setting:
        """``whole``, ``exact``, ``exact:N``, ``N`` or ``paper``; None for automatic.

        Raises:
            ConfigError: anything else.
        """
        if text is None:
            return cls()
        if text in ("whole", "exact", "paper"):
            return cls(text)  # type: ignore[arg-type]  # mypy does not narrow by a tuple
        if match := re.fullmatch(r"(exact:)?([1-9][0-9]{0,6})", text):
            return cls("exact" if match[1] else "blend", int(match[2]))
        raise ConfigError(f"--tile {text}: expected whole, exact, exact:N, N (pixels of a window's side) or paper.")


@final
@dataclass(frozen=True)
class Plan:
    """How one picture is taken.

    Attributes:
        mode: how.
        rows: windows along H.
        columns: windows along W.
    """

    mode: Mode
    rows: list[Line]
    columns: list[Line]

    @property
    def windows(self) -> int:
        """How many."""
        return len(self.rows) * len(self.columns)

    def __str__(self) -> str:
        """For the user: how, how many windows, and what they cost."""
        if self.windows == 1:
            return "whole"
        side = max(line.seen.stop - line.seen.start for line in (*self.rows, *self.columns))
        how = "exact" if self.mode == "exact" else "blended windows"
        work = f"{cost(self.rows, self.columns):.2f} times the work"
        return f"{how}, {self.windows} windows of up to {side} pixels, {work}"


def plan_whole(height: int, width: int) -> Plan:
    """One window."""
    return Plan("whole", [Line(slice(0, height), slice(0, height))], [Line(slice(0, width), slice(0, width))])


def check_setting(setting: Setting, step: int) -> None:
    """Refuse a side that no picture could be taken with.

    Raises:
        ConfigError: as :func:`plan_exact` and :func:`plan_blend`.
    """
    if setting.side is None:
        return
    if setting.mode == "exact":
        check_core(setting.side, step)
    else:
        check_side(setting.side, _shared(setting.side), step)


def plan_exact(height: int, width: int, halo: Halo, core: int, step: int) -> Plan:
    """Windows that give the answer of the whole; one where the halo covers the picture anyway.

    Raises:
        ConfigError: as :func:`densectx.inference.windows.exact_lines`.
    """
    rows = exact_lines(height, core, halo.top, halo.bottom, step)
    columns = exact_lines(width, core, halo.left, halo.right, step)
    if cost(rows, columns) >= len(rows) * len(columns):  # every window is the picture
        return plan_whole(height, width)
    return Plan("exact", rows, columns)


def plan_blend(height: int, width: int, side: int, step: int) -> Plan:
    """Overlapping windows with weights.

    Raises:
        ConfigError: as :func:`densectx.inference.windows.overlapping_lines`.
    """
    lines = (overlapping_lines(size, side, _shared(side), step) for size in (height, width))
    return Plan("blend", *lines)


def _shared(side: int) -> int:
    """Pixels that a blended window has in common with its neighbour, at least."""
    return int(side * OVERLAP)


def run_exact(run: Run, source: Source, sinks: Mapping[str, Sink], scales: Mapping[str, int], plan: Plan) -> None:
    """Answer window by window and keep of each what is that of the whole picture.

    Args:
        run: a picture's answers by task.
        source: the picture.
        sinks: by task.
        scales: size of the answer / size of the picture, by task.
        plan: whole or exact.
    """
    for window in grid(plan.rows, plan.columns):
        answers = run(source.read(window.rows.seen, window.columns.seen))
        for key, sink in sinks.items():
            rows, columns = (times(line.kept, scales[key]) for line in window)
            high, wide = (times(inside(line), scales[key]) for line in window)
            sink.write(rows, columns, answers[key][..., high, wide].cpu())


def inside(line: Line) -> slice:
    """What is kept, counted from the first pixel that is seen."""
    return slice(line.kept.start - line.seen.start, line.kept.stop - line.seen.start)


def times(part: slice, scale: int) -> slice:
    """A part of a picture as one of an answer that is ``scale`` times as large."""
    return slice(part.start * scale, part.stop * scale)
