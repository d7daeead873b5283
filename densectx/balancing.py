"""How the losses of several tasks become one number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from densectx.errors import ConfigError, unknown


class Balancing(nn.Module, ABC):
    """Combines {task: loss} into the loss that is minimised."""

    @abstractmethod
    def forward(self, losses: Mapping[str, Tensor], present: frozenset[str]) -> Tensor:
        """Scalar losses of the tasks of this rank, and the tasks that any rank has labels for -> a scalar.

        The losses are shares of a mean over ranks; parts that are no share (regularisers) must depend on
        ``present`` only, so that the mean over ranks is right.
        """


@final
class Fixed(Balancing):
    """Sum of weight * loss.

    Args:
        weights: {task: weight}.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def forward(self, losses: Mapping[str, Tensor], present: frozenset[str]) -> Tensor:
        """See :class:`Balancing`."""
        return torch.stack([self.weights[task] * loss for task, loss in losses.items()]).sum()


@final
class Uncertainty(Balancing):
    """Learned homoscedastic uncertainty (Kendall et al. 2018): sum of weight * loss / (2 e^s) + s / 2.

    Args:
        weights: {task: weight}.
        start: initial s (-0.5 as in LibMTL).
    """

    def __init__(self, weights: Mapping[str, float], start: float = -0.5) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.log_variance = nn.ParameterDict({task: nn.Parameter(torch.tensor(start)) for task in weights})

    def forward(self, losses: Mapping[str, Tensor], present: frozenset[str]) -> Tensor:
        """See :class:`Balancing`."""
        parts = [self.weights[task] * loss / (2 * self.log_variance[task].exp()) for task, loss in losses.items()]
        return torch.stack(parts + [self.log_variance[task] / 2 for task in sorted(present)]).sum()


_METHODS: dict[str, type[Fixed | Uncertainty]] = {"fixed": Fixed, "uncertainty": Uncertainty}


def make_balancing(name: str, weights: Mapping[str, float]) -> Balancing:
    """The method of a name, for tasks with these weights.

    Raises:
        ConfigError: unknown name.
    """
    if name not in _METHODS:
        raise ConfigError(f"model.balancing: {unknown('method', str(name), _METHODS)}")
    method: Balancing = _METHODS[name](weights)
    return method
