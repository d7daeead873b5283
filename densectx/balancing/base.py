"""The contract of a balancing method: losses and a Gram matrix of gradients to one factor a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

Needs = Literal["losses", "gram"]


@final
class Seen(NamedTuple):
    """What a method is shown at a step, the same on every rank. T tasks: those that any rank has labels for.

    Attributes:
        tasks: their keys, in the model's order.
        losses: (T,) float64, CPU: weight * loss of the global batch.
        gram: (T, T) float64, CPU: inner products of the gradients of weight * loss, see
            :mod:`densectx.balancing.gram`; None unless the method asked for it.
        seed: of the run.
        weights: (T,) float64, CPU: of the config, all positive; None is 1 each.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    gram: Tensor | None = None
    seed: int = 0
    weights: Tensor | None = None


class Balancing(nn.Module, ABC):
    """From losses and Gram matrix to one factor a task. State is kept in buffers, so that a run resumes exactly.

    Attributes:
        needs: ``"gram"`` if it looks at gradients.
        scales: what the factors multiply: the ``"losses"`` of tasks, or their ``"gradients"`` where they enter the
            shared features, so that a head keeps the gradient of weight * loss.
        compares: whether the only task of a step always has factor 1, so that the method does nothing where
            ``data.sampling`` never brings two tasks together; a fit refuses that.

    Args:
        tasks: keys of all tasks of the model.
    """

    needs: ClassVar[Needs] = "losses"
    scales: ClassVar[Literal["losses", "gradients"]] = "losses"
    compares: ClassVar[bool] = False

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)

    @abstractmethod
    def factors(self, seen: Seen) -> Tensor:
        """(T,) factors of this step; then the state goes one step on."""

    def places(self, seen: Seen) -> Tensor:
        """(T,) indices of the tasks that are seen among all tasks, for state that is one number a task."""
        return torch.tensor([self.tasks.index(task) for task in seen.tasks])


class Learned(Balancing, ABC):
    """A method whose factors are trained with the network and held by a regulariser."""

    @abstractmethod
    def regulariser(self, shares: Mapping[str, float]) -> Tensor:
        """A scalar, the same on every rank.

        Args:
            shares: {task that any rank has labels for: share of its regulariser that belongs to this batch}; 1
                without accumulation.
        """
