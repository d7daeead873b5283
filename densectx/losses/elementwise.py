"""Losses of numbers: penalties of single errors."""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from densectx.errors import ConfigError, PluginError
from densectx.losses.base import Countable, Loss


class _Elementwise(Loss, Countable):
    """A mean over labelled elements; NaN in the target is unlabelled."""

    takes = ("numbers",)

    @abstractmethod
    def penalty(self, error: Tensor) -> Tensor:
        """The penalty of each error, same shape."""

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float twice, NaN = unlabelled -> (sum, number of labelled elements).

        Raises:
            PluginError: the shapes differ; torch would pair every number with several others.
        """
        if output.shape != target.shape:
            raise PluginError(
                f"loss {type(self).__name__}: the output is {tuple(output.shape)}, the target {tuple(target.shape)};"
                " expected one shape. Let `prepare` of the task make a target as its head answers, (B, C, H, W)."
            )
        labelled = ~target.isnan()
        # where() before the penalty: a NaN behind it would poison the gradient
        error = torch.where(labelled, output - target, 0.0)
        return (self.penalty(error) * labelled).sum(), labelled.sum().to(error.dtype)

    def weight(self, target: Tensor) -> Tensor:
        """Number of labelled elements."""
        return (~target.isnan()).sum().to(target.dtype)


@final
class L1(_Elementwise):
    """Mean absolute error."""

    def penalty(self, error: Tensor) -> Tensor:
        """|e|."""
        return error.abs()


@final
class MSE(_Elementwise):
    """Mean squared error."""

    def penalty(self, error: Tensor) -> Tensor:
        """e^2."""
        return error.square()


@final
class Charbonnier(_Elementwise):
    """Differentiable L1, sqrt(e^2 + epsilon^2) (Lai et al. 2017).

    Args:
        epsilon: in units of the output.
    """

    def __init__(self, epsilon: float = 1e-3) -> None:
        super().__init__()
        if epsilon <= 0:
            raise ConfigError(f"charbonnier: epsilon {epsilon} must be positive.")
        self.epsilon = epsilon

    def penalty(self, error: Tensor) -> Tensor:
        """sqrt(e^2 + epsilon^2)."""
        return (error.square() + self.epsilon**2).sqrt()
