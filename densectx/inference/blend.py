"""Overlapping windows averaged by weights: for models that see the whole picture, where no tiling is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densectx.inference.tiler import Plan, Run, Sink, Source, times
from densectx.inference.windows import Line, weights


@final
class _Band:
    """The rows of one answer that are not finished: sums of weighted windows, and what the seams are measured on.

    Args:
        plan: the windows.
        scale: size of the answer / size of the picture.
        sink: where finished rows go.

    Attributes:
        seam: largest difference so far between neighbours where both see the picture.
    """

    def __init__(self, plan: Plan, scale: int, sink: Sink) -> None:
        self.plan, self.scale, self.sink = plan, scale, sink
        self.first, self.sums = 0, torch.zeros(0)
        self.seam = 0.0
        self._left: Tensor | None = None
        self._above: list[Tensor] = []
        self._below: list[Tensor] = []

    def add(self, row: int, column: int, answer: Tensor, weight: Tensor) -> None:
        """A window's answer (K, h, w), with weights (h, w)."""
        rows, columns = times(self.plan.rows[row].kept, self.scale), times(self.plan.columns[column].kept, self.scale)
        if self.sums.ndim == 1:
            self.sums = torch.zeros(answer.shape[0], 0, times(self.plan.columns[-1].kept, self.scale).stop)
        if (lack := rows.stop - self.first - self.sums.shape[1]) > 0:
            more = self.sums.new_zeros(self.sums.shape[0], lack, self.sums.shape[2])
            self.sums = torch.cat([self.sums, more], 1)
        self.sums[:, rows.start - self.first : rows.stop - self.first, columns] += answer * weight
        self._measure(row, column, answer)

    def _measure(self, row: int, column: int, answer: Tensor) -> None:
        if self._left is not None:
            shared = self._left.shape[-1]
            self.seam = max(self.seam, (answer[..., :shared] - self._left).abs().max().item())
        if self._above:
            shared = self._above[column].shape[1]
            self.seam = max(self.seam, (answer[:, :shared] - self._above[column]).abs().max().item())
        right, below = _shared(self.plan.columns, column), _shared(self.plan.rows, row)
        self._left = answer[..., -right * self.scale :].clone() if right else None
        self._below.append(answer[:, -below * self.scale :].clone() if below else answer[:, :0])

    def end_row(self, row: int) -> None:
        """Write the rows that no further window touches."""
        last = row + 1 == len(self.plan.rows)
        until = (self.plan.rows[row].kept.stop if last else self.plan.rows[row + 1].kept.start) * self.scale
        ready = until - self.first
        self.sink.write(slice(self.first, until), slice(0, self.sums.shape[2]), self.sums[:, :ready])
        self.first, self.sums = until, self.sums[:, ready:].clone()
        self._left, self._above, self._below = None, self._below, []


def run_blended(
    run: Run, source: Source, sinks: Mapping[str, Sink], scales: Mapping[str, int], plan: Plan
) -> dict[str, float]:
    """Answer in overlapping windows and average them by weights that fall towards their borders.

    Args:
        run: a picture's answers by task.
        source: the picture.
        sinks: by task; rows come from top to bottom.
        scales: size of the answer / size of the picture, by task.
        plan: of :func:`densectx.inference.tiler.plan_blend`.

    Returns:
        {task: seam error}: the largest difference between the answers of two neighbours where both see the picture.
    """
    by_row, by_column = weights(plan.rows), weights(plan.columns)
    bands = {key: _Band(plan, scales[key], sink) for key, sink in sinks.items()}
    for row, vertical in enumerate(plan.rows):
        for column, horizontal in enumerate(plan.columns):
            answers = run(source.read(vertical.seen, horizontal.seen))
            for key, band in bands.items():
                weight = _stretched(by_row[row], band.scale)[:, None] * _stretched(by_column[column], band.scale)
                band.add(row, column, answers[key].float().cpu(), weight)
        for band in bands.values():
            band.end_row(row)
    return {key: band.seam for key, band in bands.items()}


def _stretched(line: NDArray[np.float64], scale: int) -> Tensor:
    return torch.from_numpy(line).float().repeat_interleave(scale)


def _shared(lines: list[Line], index: int) -> int:
    """Pixels that a window has in common with the next one."""
    return lines[index].kept.stop - lines[index + 1].kept.start if index + 1 < len(lines) else 0
