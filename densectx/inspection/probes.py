"""What is computed with real weights, at sizes that take seconds: effective field and errors under shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import torch
from torch import Tensor, nn

from densectx.inspection.cost import cost
from densectx.inspection.effective import EffectiveField, effective_field
from densectx.inspection.equivariance import ShiftError, equivariance
from densectx.inspection.halo import Halo, answer, step_of
from densectx.inspection.references import references
from densectx.model import DenseModel
from densectx.nn.context import Context

BUDGET: Final = 100_000_000_000
"""Multiply-adds that a probe may take unless its size is given: seconds on a core."""
SAMPLES: Final = 4
_SIDES: Final = (512, 384, 256, 192, 128, 64)
_PASSES: Final = 3  # forward and backward, in units of a forward pass


def effective_of_task(model: DenseModel, key: str, halo: Halo, side: int | None) -> EffectiveField | None:
    """The effective field of a task's answer in pixels of its input; None where no size is cheap enough.

    Args:
        model: with weights.
        key: of the task.
        halo: of the task.
        side: of the inputs, rounded up to what the model takes; None for the largest, up to the field, in the budget.
    """
    task = model.task(key)
    cell = step_of(model, key)
    reach = max(halo.left, halo.right, halo.top, halo.bottom)
    sides = _SIDES if side is None else (side,)
    wanted = [min(one, 2 * reach + cell) for one in sides] if side is None else [side]
    for one in wanted:
        length = -(-math.ceil(one) // cell) * cell
        picture = length // task.input_scale
        if side is None and _PASSES * SAMPLES * cost(model, (picture, picture), [key]).total.macs > BUDGET:
            continue

        def run(module: nn.Module, x: Tensor) -> Tensor:
            return answer(module, key, x)

        return effective_field(model, (1, task.channels, length, length), SAMPLES, run=run)
    return None


def shifts_of_task(
    model: DenseModel, key: str, halo: Halo, shifts: Sequence[int], *, always: bool
) -> list[ShiftError] | None:
    """Errors of a task's answer under shifts of its input, on a strip of one cell; None beyond the budget.

    Args:
        model: with weights.
        key: of the task.
        halo: of the task.
        shifts: in pixels of the input.
        always: whatever it costs.
    """
    task, reach = model.task(key), max(halo.left, halo.right)
    cell, scale = step_of(model, key), Fraction(task.scale, task.input_scale)
    kept = 2 * (max(shifts) + cell)
    length = -(-math.ceil((2 * reach if math.isfinite(reach) else 256) + kept) // cell) * cell
    picture = (cell // task.input_scale, length // task.input_scale)
    if not always and (len(shifts) + 1) * cost(model, picture, [key]).total.macs > BUDGET:
        return None

    def run(x: Tensor) -> Tensor:
        return answer(model, key, x)

    x = torch.rand(1, task.channels, cell, length, generator=torch.Generator().manual_seed(0))
    return equivariance(run, x, shifts, reach * float(scale), scale=scale)


def shifts_of_context(context: Context, channels: int, shifts: Sequence[int]) -> list[ShiftError]:
    """Errors of a context module at its own resolution, in cells, on a strip of one line."""
    reach = (context.receptive_field - 1) / 2
    length = math.ceil(2 * reach if math.isfinite(reach) else 128) + 4 * max(shifts)
    x = torch.rand(1, channels, 1, length, generator=torch.Generator().manual_seed(0))
    return equivariance(context, x, shifts, reach)


def shifts_of_references(shifts: Sequence[int]) -> dict[str, list[ShiftError]]:
    """Errors of small networks with random weights and circular padding, to compare with."""
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {name: equivariance(network, x, shifts, 0) for name, network in references().items()}
