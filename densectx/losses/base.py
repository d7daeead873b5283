"""The contract of a loss: a (sum, weight) pair, so that it can be normalised over ranks exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Loss(nn.Module, ABC):
    """One loss term: (output, target) -> (sum, weight), float32 scalars; its value is sum / weight.

    Unlabelled pixels count in neither; with nothing labelled the result is (0 with a graph, 0), never NaN.
    """

    @abstractmethod
    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) and a target as the loss says -> (sum, weight)."""
