"""Methods that look at how the gradients of tasks lie to each other: functions of their Gram matrix.

All work in float64 on the CPU: the matrix has as many rows as there are tasks. What the gradients are is said in
:mod:`densectx.balancing.gram`. A task without a gradient in the shared part is left out: factor 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from densectx.balancing import solvers
from densectx.balancing.base import Balancing, Needs, Seen
from densectx.errors import ConfigError
from densectx.rng import generator


class _OfGram(Balancing):
    """Factors of a step's gradients, nothing of the steps before but their number, which randomness counts from.

    Args:
        tasks: given by the model.
    """

    needs: ClassVar[Needs] = "gram"
    scales: ClassVar[Literal["losses", "gradients"]] = "gradients"
    compares: ClassVar[bool] = True
    steps: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @abstractmethod
    def solve(self, gram: Tensor, rng: torch.Generator) -> Tensor:
        """(T, T) float64, positive semi-definite, positive diagonal -> (T,) factors."""

    @torch.no_grad()
    def factors(self, seen: Seen) -> Tensor:
        """See :class:`Balancing`."""
        assert seen.gram is not None
        found = torch.ones(len(seen.tasks), dtype=torch.float64)
        moved = seen.gram.diagonal() > 0
        if moved.any():
            rng = generator(seen.seed, "balancing", int(self.steps))
            found[moved] = self.solve(seen.gram[moved][:, moved], rng)
        self.steps += 1
        return found


@final
class PCGrad(_OfGram):
    """Gradient surgery (Yu et al. 2020, algorithm 1): each gradient loses what goes against another one.

    For each task the others are taken in a random order; where its gradient, as it is by then, has a negative inner
    product with the other's, it is projected onto that one's normal plane. The factors are those of the sum.
    """

    def solve(self, gram: Tensor, rng: torch.Generator) -> Tensor:
        """See the class."""
        count = len(gram)
        total = torch.zeros(count, dtype=gram.dtype)
        for task in range(count):
            own = torch.zeros(count, dtype=gram.dtype)
            own[task] = 1
            for other in torch.randperm(count, generator=rng).tolist():
                inner = own @ gram[other]
                if other != task and inner < 0:
                    own[other] -= inner / gram[other, other]
            total += own
        return total


@final
class MGDA(_OfGram):
    """The shortest convex combination of the gradients (Désidéri 2012; Sener & Koltun 2018, equation 3).

    No task's loss rises along it to first order; factors sum to 1, with ``l2`` their products with the gradients'
    lengths do. With ``of: features`` it is their MGDA-UB.

    Args:
        tasks: given by the model.
        normalise: ``none``, or ``l2``: gradients of length 1 (then a task with a small gradient does not take all).
    """

    def __init__(self, tasks: Sequence[str], normalise: Literal["none", "l2"] = "none") -> None:
        super().__init__(tasks)
        if normalise not in ("none", "l2"):
            raise ConfigError(f"mgda: normalise {normalise!r} is not 'none' or 'l2'.")
        self.normalise = normalise

    def solve(self, gram: Tensor, rng: torch.Generator) -> Tensor:
        """See the class."""
        norms = gram.diagonal().sqrt() if self.normalise == "l2" else torch.ones_like(gram[0])
        return solvers.shortest(gram / norms[:, None] / norms) / norms


@final
class IMTLG(_OfGram):
    """Impartial learning (Liu et al. 2021, section 3.1): the sum has equal projections onto every task's direction.

    Factors sum to 1 and may be negative. The paper's equation 5 is, in terms of the Gram matrix K with d the lengths,
    K^-1 d divided by its sum; the pseudo-inverse where gradients are dependent. Where that sum is 0 there is no such
    direction: all factors are 1 / T.
    """

    def solve(self, gram: Tensor, rng: torch.Generator) -> Tensor:
        """See the class."""
        norms = gram.diagonal().sqrt()
        # with gradients of length 1 the pseudo-inverse's threshold does not depend on the scales of losses
        unit = torch.linalg.pinv(gram / norms[:, None] / norms, hermitian=True, rtol=1e-10).sum(1) / norms
        total = unit.sum()
        if total.abs() < 1e-9 * unit.abs().sum() or not unit.any():
            return torch.full_like(norms, 1 / len(norms))
        found: Tensor = unit / total
        return found


@final
class UPGrad(_OfGram):
    """Each gradient projected onto the cone of directions against which no task stands; their sum (Quinton & Rey 2024).

    No task's loss rises along it to first order; without conflict every factor is 1. The projections are quadratic
    programs of T unknowns, solved by ``scipy.optimize.nnls``: torchjd's own solver needs quadprog, whose licence (GPL)
    this package's users may not want.
    """

    def solve(self, gram: Tensor, rng: torch.Generator) -> Tensor:
        """See the class."""
        return solvers.onto_dual_cone(gram).sum(0)


@final
class NashMTL(_OfGram):
    """The Nash bargaining solution (Navon et al. 2022, claim 3.1): factors a > 0 with K a = 1 / a.

    Solved exactly by Newton's method (it is the minimum of a convex function), so without state and without the
    paper's solver, whose licence is GPL. Scaled to a sum of T: the length 1 / a would have depends on the losses'
    units, and the paper clips it.
    """

    def solve(self, gram: Tensor, rng: torch.Generator) -> Tensor:
        """See the class."""
        found = solvers.bargain(gram)
        return len(found) * found / found.sum()


@final
class GradNorm(Balancing):
    """Gradients of the pace that tasks should have (Chen et al. 2018, algorithm 1): learned factors of the losses.

    G_i = v_i * length of task i's gradient; v goes down the slope of sum_i |G_i - mean(G) r_i^alpha|, r_i = relative
    loss ratio L_i(t) / L_i(0) over its mean, mean(G) and r held, and is then scaled to a sum of T. The slope is
    divided by mean(G), so that ``lr`` has no unit. L(0) is the task's first loss; L is without the task's weight, so
    that a run may go on with another one.

    Args:
        tasks: given by the model.
        alpha: 0 equalises the lengths, more lets slow tasks pull harder; 1.5 in most of the paper.
        lr: of v.
    """

    needs: ClassVar[Needs] = "gram"
    compares: ClassVar[bool] = True
    pace: Tensor
    first: Tensor

    def __init__(self, tasks: Sequence[str], alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(tasks)
        if alpha < 0 or lr <= 0:
            raise ConfigError(f"gradnorm: alpha {alpha} must not be negative and lr {lr} must be positive.")
        self.alpha, self.lr = alpha, lr
        self.register_buffer("pace", torch.ones(len(self.tasks), dtype=torch.float64))
        self.register_buffer("first", torch.full((len(self.tasks),), torch.nan, dtype=torch.float64))

    @torch.no_grad()
    def factors(self, seen: Seen) -> Tensor:
        """Of the losses: v as it is; then v goes on."""
        assert seen.gram is not None
        at = self.places(seen).to(self.pace.device)
        pace = self.pace[at].cpu()
        known = self.first[at].cpu()
        losses = seen.losses if seen.weights is None else seen.losses / seen.weights
        self.first[at] = torch.where(known.isnan(), losses, known).to(self.first)
        ratio = (losses / self.first[at].cpu()).nan_to_num(1.0)
        length = seen.gram.diagonal().sqrt()
        pulls = pace * length
        if len(at) > 1 and (mean := pulls.mean()) > 0 and ratio.mean() > 0:
            wanted = mean * (ratio / ratio.mean()) ** self.alpha
            moved = (pace - self.lr * (pulls - wanted).sign() * length / mean).clamp_min(1e-3)
            self.pace[at] = (moved * pace.sum() / moved.sum()).to(self.pace)
        return pace
