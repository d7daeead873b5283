"""From the losses of a batch to the one that goes backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import final

import torch
from torch import Tensor, nn

from densectx.balancing.base import Balancing, Learned, Seen
from densectx.balancing.branches import Branches
from densectx.balancing.gram import Of, last_shared, of_features, of_weights
from densectx.errors import ConfigError
from densectx.model import DenseModel


@final
class Balancer:
    """Brings a method and a model together: measures, asks for factors, applies them.

    The loss that is returned is the sum of weight * loss, times the method's factor if it scales losses. A method
    that combines gradients multiplies them where they enter the features that tasks share: heads learn from
    weight * loss, everything before them from the combination, in one backward.

    Args:
        method: asked for factors.
        model: whose tasks they are.
        seed: of the run.
        of: what gradients are taken of, see :mod:`densectx.balancing.gram`.
        watch: whether to measure the gradients at the steps that are logged, for a method that does not need them.

    Raises:
        ConfigError: gradients are needed and nothing is shared.
    """

    def __init__(
        self, method: Balancing, model: DenseModel, seed: int, *, of: Of = "weights", watch: bool = False
    ) -> None:
        self.method, self.model, self.seed, self.of, self.watch = method, model, seed, of, watch
        self.weights = {key: model.task(key).weight for key in model.tasks}
        self._shared = last_shared(model) if self.measures else []
        self._branches = Branches()
        if of == "features" and self.measures:
            own = [key for key in model.tasks if not model.task(key).unchanged]
            if own or len({model.task(key).source for key in model.tasks}) > 1:
                raise ConfigError(
                    f"of: features needs tasks that share one input; {own[0] if own else 'each source'} has its own."
                    " Take of: weights."
                )

    @property
    def measures(self) -> bool:
        """Whether gradients are looked at, at some step."""
        return self.watch or self.method.needs == "gram"

    def measures_in(self, part: nn.Module) -> bool:
        """Whether gradients are taken of weights inside a part: before the step's own backward comes to them."""
        own = {id(parameter) for parameter in part.parameters()}
        return self.of == "weights" and any(id(parameter) in own for parameter in self._shared)

    def branched(self) -> AbstractContextManager[None]:
        """Around the forward pass: tasks get branches where they are needed."""
        branches = self.method.scales == "gradients" or (self.measures and self.of == "features")
        return self._branched() if branches else nullcontext()

    @contextmanager
    def _branched(self) -> Iterator[None]:
        self.model.branch = self._branches
        try:
            yield
        finally:
            self.model.branch = None

    def __call__(
        self,
        losses: Mapping[str, Tensor],
        values: Mapping[str, float],
        shares: Mapping[str, float],
        *,
        log: bool,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, and what is to be logged.

        Args:
            losses: of the tasks of this rank, each a share of a mean over ranks.
            values: loss of the global batch, of every task that any rank has labels for.
            shares: see :meth:`Learned.regulariser`.
            log: whether this step is logged.
            scale: gives that of the gradient scaler, where there is one; asked for where gradients are measured.

        Returns:
            A scalar, and ``balance/...`` numbers, empty unless gradients were measured at a step to log.
        """
        weighted = {key: self.weights[key] * loss for key, loss in losses.items()}
        tasks = tuple(key for key in self.model.tasks if key in values and self.weights[key] > 0)
        gram = None
        if tasks and (self.method.needs == "gram" or (self.watch and log)):
            gram = self._gram(weighted, tasks, scale())
        weights = torch.tensor([self.weights[key] for key in tasks], dtype=torch.float64)
        known = weights * torch.tensor([values[key] for key in tasks], dtype=torch.float64)
        found = torch.ones_like(known)
        if tasks and known.isfinite().all() and (gram is None or gram.isfinite().all()):
            # else the step is going to be skipped or refused, and no state may learn from it
            found = self.method.factors(Seen(tasks, known, gram, self.seed, weights))
        combines = self.method.scales == "gradients"
        self._branches.fill(dict(zip(tasks, found.tolist(), strict=True)) if combines else {})
        if not combines:
            learned = found.requires_grad
            for key, factor in zip(tasks, found if learned else found.tolist(), strict=True):
                if key in weighted:
                    weighted[key] = weighted[key] * (factor.to(weighted[key]) if learned else factor)
        parts = list(weighted.values())
        held = {key: share for key, share in shares.items() if self.weights[key] > 0}
        if isinstance(self.method, Learned) and held:
            parts.append(self.method.regulariser(held))
        loss = torch.stack(parts).sum() if parts else torch.zeros((), device=next(self.model.parameters()).device)
        return loss, self._numbers(tasks, gram, found.tolist()) if gram is not None and log else {}

    def _gram(self, weighted: Mapping[str, Tensor], tasks: tuple[str, ...], scale: float) -> Tensor:
        if self.of == "features":
            device = next(self.model.parameters()).device
            return of_features(weighted, tasks, self._branches.features, scale, device=device)
        return of_weights(weighted, tasks, self._shared, scale)

    def _numbers(self, tasks: tuple[str, ...], gram: Tensor, factors: list[float]) -> dict[str, float]:
        norms = gram.diagonal().sqrt().tolist()
        found: dict[str, float] = {}
        for i, (task, norm, factor) in enumerate(zip(tasks, norms, factors, strict=True)):
            found[f"balance/norm/{task}"] = norm
            found[f"balance/weight/{task}"] = factor * self.weights[task]
            for j in range(i):
                if norm > 0 and norms[j] > 0:
                    found[f"balance/cos/{tasks[j]}/{task}"] = float(gram[i, j]) / (norm * norms[j])
        return found
