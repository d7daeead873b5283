"""The contract of a loss: a (sum, weight) pair, so that it can be normalised over ranks exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

from torch import Tensor, nn

Form: TypeAlias = Literal["ids", "labels", "numbers"]
"""What a target is: ``"ids"`` (B, H, W) int64 class ids, ``"labels"`` (B, K, H, W) float in 0..1 for each class on its
own, ``"numbers"`` (B, C, H, W) float of any range. Unlabelled is the ignore index in ids, NaN in the others."""


class Loss(nn.Module, ABC):
    """One loss term: (output, target) -> (sum, weight), float32 scalars; its value is sum / weight.

    Unlabelled pixels count in neither; with nothing labelled the result is (0 with a graph, 0), never NaN. The losses
    of densectx are :class:`Countable` too, but for the bins of chroma.

    Attributes:
        takes: the forms of target it is for, others are refused when it is built for a task; empty for any.
    """

    takes: tuple[Form, ...] = ()

    @abstractmethod
    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) and a target as the loss says -> (sum, weight)."""


class Countable(ABC):
    """A loss whose weight is known from the target alone, so that it can be added up before any output is there.

    With gradient accumulation such a term is normalised over the whole window: N batches then have the gradient of
    one batch with all their samples.
    """

    @abstractmethod
    def weight(self, target: Tensor) -> Tensor:
        """The weight that ``forward`` returns beside its sum for this target: a scalar, floating."""
