"""Methods that look at losses only, and scale them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from densectx.balancing.base import Balancing, Learned, Seen
from densectx.errors import ConfigError


@final
class Fixed(Balancing):
    """The task weights of the config and nothing else: every factor is 1.

    Args:
        tasks: given by the model.
    """

    def factors(self, seen: Seen) -> Tensor:
        """Ones."""
        return torch.ones(len(seen.tasks), dtype=torch.float64)


@final
class Uncertainty(Learned):
    """Learned homoscedastic uncertainty (Kendall, Gal & Cipolla 2018): sum of weight * loss / (2 e^s) + s / 2.

    s is one parameter a task, trained by the optimizer of the network.

    Args:
        tasks: given by the model.
        start: initial s (-0.5 as in LibMTL).
    """

    def __init__(self, tasks: Sequence[str], start: float = -0.5) -> None:
        super().__init__(tasks)
        self.log_variance = nn.ParameterDict({task: nn.Parameter(torch.tensor(float(start))) for task in tasks})

    def factors(self, seen: Seen) -> Tensor:
        """1 / (2 e^s), with a graph."""
        return torch.stack([0.5 * (-self.log_variance[task]).exp() for task in seen.tasks])

    def regulariser(self, shares: Mapping[str, float]) -> Tensor:
        """Sum of s / 2."""
        return torch.stack([share / 2 * self.log_variance[task] for task, share in sorted(shares.items())]).sum()


@final
class DWA(Balancing):
    """Dynamic weight average (Liu, Johns & Davison 2019, equation 7): a task whose loss falls slowly counts more.

    Factor T * softmax(r / temperature), r the ratio of the task's last two mean losses. The paper's means are those
    of epochs; here of ``every`` batches in which the task had labels, since epochs of joint data sets mean little.
    Until two means are known r is 1.

    Args:
        tasks: given by the model.
        temperature: positive; 2 in the paper, larger is more even.
        every: batches a mean is taken over.
    """

    compares: ClassVar[bool] = True
    sums: Tensor
    counts: Tensor
    means: Tensor

    def __init__(self, tasks: Sequence[str], temperature: float = 2.0, every: int = 100) -> None:
        super().__init__(tasks)
        if temperature <= 0 or every < 1:
            raise ConfigError(f"dwa: temperature {temperature} and every {every} must be positive.")
        self.temperature, self.every = temperature, every
        self.register_buffer("sums", torch.zeros(len(self.tasks), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(len(self.tasks), dtype=torch.long))
        self.register_buffer("means", torch.full((2, len(self.tasks)), torch.nan, dtype=torch.float64))

    @torch.no_grad()
    def factors(self, seen: Seen) -> Tensor:
        """Of the means so far; then the losses are counted."""
        at = self.places(seen).to(self.sums.device)
        before, last = self.means[:, at].cpu()
        ratio = (last / before).nan_to_num(1.0)
        self.sums[at] += seen.losses.to(self.sums)
        self.counts[at] += 1
        full = self.counts >= self.every
        mean = self.sums / self.counts.clamp_min(1)
        self.means.copy_(torch.where(full, torch.stack([self.means[1], mean]), self.means))
        self.sums[full], self.counts[full] = 0, 0
        found: Tensor = len(seen.tasks) * (ratio / self.temperature).softmax(0)
        return found


@final
class FAMO(Balancing):
    """Fast adaptive multitask optimization (Liu, Feng, Stone & Liu 2023, algorithm 1).

    z = softmax(xi); factors z_i / l_i, scaled to a sum of 1, lower the logarithms of all losses at one pace. xi is
    moved by Adam along J^T (log l - log l'), J the Jacobian of the softmax: a task that fell much counts less from
    then on. The paper's l' is the loss of the same batch after the step, a second forward pass; here it is that of
    the task's next batch, whose noise the small step averages out.

    Args:
        tasks: given by the model.
        lr: of xi (0.025 in the paper).
        decay: weight decay of xi (gamma, 0.001 in the paper).
        floor: what every loss is known to lie above; l is the loss minus it.
    """

    compares: ClassVar[bool] = True
    xi: Tensor
    momentum: Tensor
    square: Tensor
    last: Tensor
    steps: Tensor

    def __init__(self, tasks: Sequence[str], lr: float = 0.025, decay: float = 1e-3, floor: float = 0.0) -> None:
        super().__init__(tasks)
        if lr <= 0 or decay < 0:
            raise ConfigError(f"famo: lr {lr} must be positive and decay {decay} not negative.")
        self.lr, self.decay, self.floor = lr, decay, floor
        for name in ("xi", "momentum", "square"):
            self.register_buffer(name, torch.zeros(len(self.tasks), dtype=torch.float64))
        self.register_buffer("last", torch.full((len(self.tasks),), torch.nan, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def factors(self, seen: Seen) -> Tensor:
        """First xi learns from what the losses have become, then the factors are its."""
        at = self.places(seen).to(self.xi.device)
        level = (seen.losses - self.floor).clamp_min(1e-8)
        fell = (self.last[at].cpu().log() - level.log()).nan_to_num(0.0)  # nothing is known of a task at its first
        if fell.any():
            z = self.xi[at].cpu().softmax(0)
            self._adam(at, z * (fell - (z * fell).sum()))
        self.last[at] = level.to(self.last)
        raw = self.xi[at].cpu().softmax(0) / level
        return raw / raw.sum()

    def _adam(self, at: Tensor, gradient: Tensor) -> None:
        """Kingma & Ba 2015 with its usual constants."""
        gradient = gradient.to(self.xi) + self.decay * self.xi[at]
        self.steps += 1
        self.momentum[at] = 0.9 * self.momentum[at] + 0.1 * gradient
        self.square[at] = 0.999 * self.square[at] + 0.001 * gradient.square()
        count = int(self.steps)
        mean, square = self.momentum[at] / (1 - 0.9**count), self.square[at] / (1 - 0.999**count)
        self.xi[at] -= self.lr * mean / (square.sqrt() + 1e-8)
