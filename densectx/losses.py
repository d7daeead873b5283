"""Losses as (sum, weight) pairs, so that each can be normalised over ranks exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.registry import LOSSES
from densectx.types import Spec, Terms


class Loss(nn.Module, ABC):
    """One loss term: (output, target) -> (sum, weight), float32 scalars; its value is sum / weight.

    Unlabelled pixels count in neither; with nothing labelled the result is (0 with a graph, 0), never NaN.
    """

    @abstractmethod
    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) and a target as the loss says -> (sum, weight)."""


@final
class CrossEntropy(Loss):
    """Softmax cross-entropy of logits (B, K, H, W) and class ids (B, H, W) int64.

    Weight = the summed class weights of labelled pixels, as in ``torch.nn.functional.cross_entropy``.

    Args:
        ignore_index: id of unlabelled pixels, given by the task.
        classes: number of classes, given by the task.
        class_weights: one factor a class, or null for 1.
        label_smoothing: in [0, 1).
    """

    class_weights: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        classes: int | None = None,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if class_weights is not None and classes not in (None, len(class_weights)):
            raise ConfigError(f"cross_entropy: {len(class_weights)} class_weights for {classes} classes.")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"cross_entropy: label_smoothing {label_smoothing} is not in [0, 1).")
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        # not persistent: a number of the config, not learned
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, H, W) float logits, (B, H, W) int64 -> (sum, weight)."""
        weights = self.class_weights
        total = F.cross_entropy(
            output,
            target,
            weights,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        labelled = target != self.ignore_index
        weight = labelled.sum() if weights is None else weights[target[labelled]].sum()
        return total, weight.to(total.dtype)


class _Elementwise(Loss):
    """A mean over labelled elements; NaN in the target is unlabelled."""

    @abstractmethod
    def penalty(self, error: Tensor) -> Tensor:
        """The penalty of each error, same shape."""

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float twice, NaN = unlabelled -> (sum, number of labelled elements)."""
        labelled = ~target.isnan()
        # where() before the penalty: a NaN behind it would poison the gradient
        error = torch.where(labelled, output - target, 0.0)
        return (self.penalty(error) * labelled).sum(), labelled.sum().to(error.dtype)


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


@final
class Criterion(nn.Module):
    """A weighted sum of losses, from a spec or a list of specs with an optional ``weight`` each.

    Args:
        spec: ``"l1"``, ``{"name": "l1", "weight": 0.5}`` or a list of those with different names.
        where: key path for messages.
        runtime: arguments that the task supplies to losses that take them.

    Attributes:
        coefficients: {term: weight in the sum}.
    """

    def __init__(self, spec: Spec | Sequence[Spec], where: str = "loss", **runtime: Any) -> None:
        super().__init__()
        specs = [spec] if isinstance(spec, str | Mapping) else list(spec)
        self.terms = nn.ModuleDict()
        self.coefficients: dict[str, float] = {}
        for one in specs:
            options = {"name": one} if isinstance(one, str) else dict(one)
            coefficient = float(options.pop("weight", 1.0))
            loss = LOSSES.build(options, where, **runtime)
            name = str(options["name"]).rpartition("/")[2].rpartition(":")[2]
            if name in self.coefficients:
                raise ConfigError(f"{where}: loss {name!r} is listed twice.")
            self.terms[name] = loss
            self.coefficients[name] = coefficient
        if not self.coefficients:
            raise ConfigError(f"{where}: at least one loss is needed.")

    def __call__(self, output: Tensor, target: Tensor) -> Terms:
        """As :meth:`forward`."""
        terms: Terms = super().__call__(output, target)
        return terms

    def forward(self, output: Tensor, target: Tensor) -> Terms:
        """The terms, each (sum, weight), before their coefficients."""
        return {name: loss(output, target) for name, loss in self.terms.items()}
