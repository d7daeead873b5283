"""Loss terms are sums over weights: of all ranks, and of the accumulation window where weights can be counted ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce, get_world_size, is_available, is_initialized

from densectx.errors import ConfigError
from densectx.model import DenseModel
from densectx.tasks.base import Counting, Target
from densectx.types import Terms

_AGREE = 1e-4  # relative: weights are float32 sums, of the same numbers


@final
class Window(NamedTuple):
    """What is known of an accumulation window before its first output.

    Attributes:
        counts: weight over all ranks of each term (columns) in each batch (rows); NaN where it is not countable.
        present: {task: the batches in which any rank has targets for it}.
        divisor: what the trainer divides the loss of each batch by.
    """

    counts: list[list[float]]
    present: dict[str, int]
    divisor: int


@final
class Normalised(NamedTuple):
    """The losses of a batch.

    Attributes:
        shares: of this rank, {task: its share of the mean over ranks}, with a graph.
        values: {task that any rank has labels for: loss of the global batch}.
        regular: {task: share of its regulariser}, see :meth:`densectx.balancing.Learned.regulariser`.
        totals: (sum, weight) of each term over all ranks.
    """

    shares: dict[str, Tensor]
    values: dict[str, float]
    regular: dict[str, float]
    totals: list[list[float]]


@final
class Normaliser:
    """Turns (sum, weight) of this rank into its share of the loss.

    A term's loss in an optimizer step is its sum over its weight, both over all ranks and all batches of the window:
    exactly that of one batch with all the samples. A term that is not countable from targets
    (:attr:`densectx.tasks.base.Task.countable`) is normalised in each batch over all ranks, and averaged over the
    batches of the window that have the task.

    Args:
        model: whose terms they are.
    """

    def __init__(self, model: DenseModel) -> None:
        self._tasks = {key: model.task(key) for key in model.tasks}
        self.terms = [(key, term) for key, task in self._tasks.items() for term in task.coefficients]

    @torch.no_grad()
    def window(self, targets: Sequence[Mapping[str, Target]], divisor: int, device: torch.device) -> Window:
        """Count the weights of a window ahead, from the targets of its batches on this rank."""
        rows = [self._counted(one, device) for one in targets]
        has = torch.tensor([[key in one for key in self._tasks] for one in targets], dtype=torch.float64, device=device)
        counts = torch.cat([torch.stack(rows), has], dim=1)
        sum_over_ranks(counts)
        present = (counts[:, len(self.terms) :] > 0).sum(0).tolist()
        return Window(counts[:, : len(self.terms)].tolist(), dict(zip(self._tasks, present, strict=True)), divisor)

    def __call__(
        self, terms: Mapping[str, Terms], device: torch.device, window: Window | None, index: int
    ) -> Normalised:
        """Normalise a batch.

        Args:
            terms: of the tasks that this rank has data for.
            device: of the sums.
            window: the batch's window; None for one of its own.
            index: of the batch in the window.

        Raises:
            ConfigError: a weight is not what was counted ahead.
        """
        sums = self.sums(terms, device)
        world = sum_over_ranks(sums)
        totals: list[list[float]] = sums.tolist()
        batches = 1 if window is None else len(window.counts)
        times = 1 if window is None else window.divisor
        ahead = [nan] * len(totals) if window is None else window.counts[index]
        shares: dict[str, Tensor] = {}
        regular: dict[str, float] = {}
        for place, ((key, term), (_, all_weight)) in enumerate(zip(self.terms, totals, strict=True)):
            # over the batches that have the task: over all of them one whose source is rare would count less
            own = batches if window is None else max(window.present[key], 1)
            coefficient, weight, factor = self._tasks[key].coefficients[term], all_weight, times / own
            if window is not None and ahead[place] == ahead[place]:
                if abs(ahead[place] - all_weight) > _AGREE * max(all_weight, ahead[place]):
                    raise ConfigError(
                        f"loss {term!r} has weight {all_weight:g}, its weight() counted {ahead[place]:g} from the same"
                        " target; make them agree, or derive the loss from Loss only.",
                        f"model.tasks.{key}",
                    )
                weight, factor = sum(row[place] for row in window.counts), times
                if weight > 0:
                    regular[key] = times / batches
            if key in terms:
                share = world * factor * coefficient / max(weight, 1e-12) * terms[key][term][0]
                shares[key] = shares[key] + share if key in shares else share
            if all_weight > 0:
                regular.setdefault(key, times / own)
        return Normalised(shares, self.values(totals), regular, totals)

    def sums(self, terms: Mapping[str, Terms], device: torch.device) -> Tensor:
        """(sum, weight) of every term, (terms, 2) float64 without graph; zero where this rank has no data for it."""
        zero = torch.zeros((), device=device)
        table = [terms[key][term] if key in terms else (zero, zero) for key, term in self.terms]
        return torch.stack([torch.stack([total.detach(), weight]) for total, weight in table]).double()

    def values(self, totals: list[list[float]]) -> dict[str, float]:
        """{task: its loss} of (sum, weight) of every term; of the tasks that have a weight."""
        values: dict[str, float] = {}
        for (key, term), (total, weight) in zip(self.terms, totals, strict=True):
            if weight > 0:
                values[key] = values.get(key, 0.0) + self._tasks[key].coefficients[term] * total / weight
        return values

    def _counted(self, targets: Mapping[str, Target], device: torch.device) -> Tensor:
        found = {
            key: task.weights(target)
            for key, target in targets.items()
            if isinstance(task := self._tasks[key], Counting)
        }
        zero, unknown = torch.zeros((), device=device), torch.full((), nan, device=device)
        return torch.stack(
            [
                (found[key][term] if key in found else zero) if term in self._tasks[key].countable else unknown
                for key, term in self.terms
            ]
        ).double()


@final
class Evaluated:
    """Loss terms of an evaluation, each its sum over its weight, both of all batches and ranks.

    Args:
        normaliser: knows the terms.
    """

    def __init__(self, normaliser: Normaliser) -> None:
        self._normaliser = normaliser
        self._sums: Tensor | None = None

    def add(self, terms: Mapping[str, Terms], device: torch.device) -> None:
        """Count a batch: the terms of the tasks that it has data for."""
        sums = self._normaliser.sums(terms, device)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, device: torch.device) -> dict[str, float]:
        """{task that any rank has labels for: its loss}; then nothing is counted. Every rank calls it."""
        sums = self._normaliser.sums({}, device) if self._sums is None else self._sums
        self._sums = None
        sum_over_ranks(sums)
        return self._normaliser.values(sums.tolist())


def sum_over_ranks(table: Tensor) -> int:
    """Sum a tensor over ranks, in place; returns the number of ranks, 1 without a process group."""
    if not (is_available() and is_initialized()):
        return 1
    all_reduce(table, op=ReduceOp.SUM)
    return get_world_size()
