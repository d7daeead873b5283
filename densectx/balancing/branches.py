"""Where a task's gradient enters the shared features it is scaled, so that one ordinary backward combines all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor


class _Scaled(torch.autograd.Function):
    """The identity; its gradient is multiplied by what ``factor`` holds when backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor  # not saved: it is filled in between
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


@final
class Branches:
    """Stands between shared features and heads: :attr:`densectx.model.DenseModel.branch`.

    Until :meth:`fill` every factor is 1, so that gradients taken before are those of the losses alone.
    """

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}  # what every task of this batch reads last
        self._factors: dict[str, Tensor] = {}

    def __call__(self, task: str, features: Sequence[Tensor]) -> list[Tensor]:
        """The same features, on the task's branch."""
        self.features[task] = features[-1]
        factor = torch.ones(
            (), dtype=torch.promote_types(features[-1].dtype, torch.float32), device=features[-1].device
        )
        self._factors[task] = factor
        return [_Scaled.apply(f, factor) if f.requires_grad else f for f in features]

    def fill(self, factors: Mapping[str, float]) -> None:
        """What the gradients of tasks are multiplied by; 1 for those that are not named. Forgets the batch."""
        for task, value in factors.items():
            if task in self._factors:
                self._factors[task].fill_(value)
        self.features, self._factors = {}, {}
