"""Where an answer is wrong, and by how much: one map a sample, whatever the task answers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from densectx.tasks.base import Target, Task

Kind: TypeAlias = Literal["classes", "labels", "levels", "values"]

MEANING: dict[Kind, str] = {
    "classes": "red: wrong class",
    "labels": "share of the labels that are wrong",
    "levels": "absolute difference, mean over channels, in levels of 255",
    "values": "absolute difference, in the unit of the truth",
}
"""What the numbers of each kind of map are."""


@final
class ErrorMap(NamedTuple):
    """Errors of one sample.

    Attributes:
        kind: what the numbers are.
        values: (H, W) float32 of at least 0, NaN where the truth is unknown.
    """

    kind: Kind
    values: Tensor


def error_map(task: Task, prediction: Tensor, target: Target, drawn: Sequence[Tensor], ignore_index: int) -> ErrorMap:
    """The errors of one sample.

    Classes and labels are compared with the truth itself, as are the numbers of a task that answers with ``values``:
    with the first entry of its target that has the shape of the answer. Pictures are compared as they are drawn, since
    a target may be in another space of colours (as that of colorization is).

    Args:
        task: the task.
        prediction: (1, K, H, W) postprocessed.
        target: one sample, as ``prepare`` gave it.
        drawn: what the task draws: input, answer, truth (3, H, W).
        ignore_index: of unlabelled pixels.

    Returns:
        NaN everywhere where there is nothing to compare: a task of classes without a target (1, H, W), or one whose
        ``draw`` gives no answer and truth of one size.
    """
    nothing = torch.full(prediction.shape[2:], torch.nan)
    truth = next((value for value in target.values() if value.shape == prediction.shape), None)
    if task.output == "classes":
        ids = next((v for v in target.values() if v.ndim == 3 and v.shape[1:] == prediction.shape[2:]), None)
        if ids is None:
            return ErrorMap("classes", nothing)
        wrong = (prediction.argmax(1) != ids).float()
        return ErrorMap("classes", wrong.masked_fill(ids == ignore_index, torch.nan)[0])
    if task.output == "labels" and truth is not None:
        wrong = ((prediction >= 0.5) != (truth >= 0.5)).float()
        return ErrorMap("labels", wrong.where(~truth.isnan(), torch.nan).nanmean(1)[0])
    if task.output == "values" and truth is not None:
        return ErrorMap("values", (prediction - truth).abs().nanmean(1)[0].float())
    if len(drawn) < 3 or drawn[1].shape != drawn[2].shape:
        return ErrorMap("levels", nothing)
    answer, other = drawn[1:3]
    return ErrorMap("levels", (answer.clamp(0, 1) - other.clamp(0, 1)).abs().mean(0).float() * 255)
