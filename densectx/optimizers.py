"""AdaMuon: steps of one size in every direction of a layer's weights; any optimizer of torch and timm works as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from densectx.errors import ConfigError

# a, b, c of five steps x -> a x + b x^3 + c x^5, which take what is not far below 1 near 1 (leloykun 2025, as in timm)
_STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_ANEW = 3
"""After so many steps the Gram matrix is made anew: each multiplies its rounding by up to 17, which no network would
notice in float32, but in TF32, which `torch.set_float32_matmul_precision` may ask for."""
_EPS = 1e-7
_SMALLEST, _LONGEST = 4, 128  # fewer rows or longer than so many times the width: a vector more than a matrix


@final
class AdaMuon(Optimizer):
    """AdaMuon (Si et al. 2025, arXiv:2507.11005) for weights of layers, AdamW for biases, norms and depth-wise filters.

    The momentum of a layer (out, in x height x width) is made orthogonal by five Newton-Schulz steps, divided by the
    root mean square of its elements over time, and scaled to a root mean square of 0.2 (equation 8), which lets it take
    AdamW's learning rates; unlike in later versions of the paper the sign of the momentum is not taken first. It is
    ``timm.optim.Muon`` with ``algo: adamuon``, which computes those steps in bfloat16 and on the whole matrix; here
    they are in float32, whatever the device, and on the small Gram matrix, about half of the multiplications for 3x3
    filters. Where a processor has no bfloat16 instructions timm's steps take many times as long as the rest of
    training.

    Args:
        params: given by the trainer; float32, float64 or bfloat16, and the state is of their dtype.
        lr: learning rate of both, 0 or more.
        weight_decay: decoupled, a fraction of the learning rate a step, of both.
        momentum: of what is made orthogonal, in [0, 1).
        betas: AdamW's for the gradient and its square; the second one is that of the orthogonal update's square too.

    Raises:
        ConfigError: an option out of its range, also of a group; weights of float16.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Checks the options of a group, also of those that the optimizer begins with.

        Raises:
            ConfigError: one is out of its range; weights of float16.
        """
        options = {**self.defaults, **param_group}
        betas = options["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ConfigError(f"betas: expected two numbers, got {betas!r}.", "optimizer")
        for name, value, top in (
            ("lr", options["lr"], math.inf),
            ("weight_decay", options["weight_decay"], math.inf),
            ("momentum", options["momentum"], 1.0),
            ("betas", betas[0], 1.0),
            ("betas", betas[1], 1.0),
        ):
            if not 0 <= value < top:
                raise ConfigError(f"{name} {value} is not in [0, {top:g}).", "optimizer")
        super().add_param_group(param_group)
        if any(weight.dtype == torch.float16 for weight in self.param_groups[-1]["params"]):
            raise ConfigError("AdaMuon's averages underflow in float16; keep the weights in float32.", "optimizer")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            others = []
            for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                if is_matrix(parameter):
                    self._turn(parameter, group)
                else:
                    others.append(parameter)
            self._adamw(others, group)
        return loss

    def _turn(self, weight: Tensor, group: dict[str, Any]) -> None:
        grad, state = weight.grad, self.state[weight]
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        average = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = orthogonal(average.flatten(1)).reshape(weight.shape).to(weight.dtype)
        beta = group["betas"][1]
        square = state["exp_avg_sq"].mul_(beta).addcmul_(update, update, value=1 - beta)
        update = update.div_(square.sqrt().add_(_EPS))
        size = update.norm().add_(_EPS)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(update.mul_(group["lr"] * 0.2 * math.sqrt(weight.numel()) / size))

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=_EPS,
            maximize=False,
        )


def is_matrix(weight: Tensor) -> bool:
    """Whether AdaMuon takes a parameter as a matrix (out, everything else).

    Vectors, depth-wise filters (out, 1, ...), and what has fewer than 4 rows or columns or is more than 128 times as
    long as wide are left to AdamW, as timm does.
    """
    if weight.ndim < 2 or 1 in weight.shape[:2]:
        return False
    short, long = sorted((weight.shape[0], math.prod(weight.shape[1:])))
    return short >= _SMALLEST and long <= _LONGEST * short


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values near 1 but for those far below the others.

    Five Newton-Schulz steps X -> (a I + b X X^T + c (X X^T)^2) X (Jordan et al. 2024, "Muon"), taken on X X^T, with
    which all of their polynomials commute.

    Args:
        matrix: (rows, columns), any floating dtype.

    Returns:
        float32 of the same shape; zeros stay zeros.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.mT).mT
    wide: Tensor = matrix.float()
    wide = wide / wide.norm().clamp_min(_EPS)
    for steps in (_STEPS[:_ANEW], _STEPS[_ANEW:]):
        gram = wide @ wide.mT
        whole = factor = _polynomial(gram, *steps[0])
        for step in steps[1:]:
            gram = factor @ gram @ factor
            factor = _polynomial(gram, *step)
            whole = factor @ whole
        wide = whole @ wide
    return wide


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor
