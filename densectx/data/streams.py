"""Which samples a step takes, counted from the step and where the run went on: nothing that depends on workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch.utils.data import Sampler

from densectx.data.sampling import make_sampling
from densectx.rng import generator

Item: TypeAlias = tuple[str, int, int]
"""A sample to fetch: source, pass over the source, index in it."""


@final
class Stream:
    """Endless positions over a source: pass = p // n, index = permutation(seed, source, pass)[p % n].

    So each sample comes exactly once a pass, whatever the batch size, the number of ranks or the epoch length.

    Args:
        seed: of the whole run.
        source: name of the source.
        length: its number of samples, positive.
    """

    def __init__(self, seed: int, source: str, length: int) -> None:
        self.seed, self.source, self.length = seed, source, length
        self._pass, self._order = -1, [0]

    def __getitem__(self, position: int) -> Item:
        pass_, place = divmod(position, self.length)
        if pass_ != self._pass:
            rng = generator(self.seed, self.source, pass_, "order")
            self._pass, self._order = pass_, torch.randperm(self.length, generator=rng).tolist()
        return self.source, pass_, self._order[place]


@final
class Origin(NamedTuple):
    """A step that is done, and where every source stood then; steps may take other numbers of samples from there on.

    Attributes:
        step: of the run.
        positions: of the next sample of each source; 0 where it is not named.
    """

    step: int
    positions: Mapping[str, int]


BEGIN = Origin(0, {})
"""Of a run."""


@final
class StepSampler(Sampler[list[Item]]):
    """The items of this rank, one training step after the other, from the step where the run stands.

    At its own step k (how many steps since the origin took the source, counted from the step of the run alone) rank r
    of W takes the positions [p + (k W + r) b, p + (k W + r + 1) b) of a source with batch size b that stood at p, so
    the global order depends on W b only, and each sample comes once a pass even where W b changes at the origin.

    Args:
        lengths: samples a source.
        batch_sizes: samples a step and rank, a source.
        sampling: which sources a step takes, see :func:`densectx.data.sampling.make_sampling`.
        seed: of the whole run.
        world: number of ranks.
        rank: this one.
        steps: steps an iteration (epoch) yields.
        start: gives the number of steps done, asked at the begin of every iteration.
        origin: where these batch sizes and ranks begin, no later than any step that is asked for.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        *,
        sampling: Any,
        seed: int,
        world: int,
        rank: int,
        steps: int,
        start: Callable[[], int],
        origin: Origin = BEGIN,
    ) -> None:
        self._streams = {source: Stream(seed, source, length) for source, length in lengths.items()}
        self._batch_sizes, self._sampling = dict(batch_sizes), make_sampling(sampling, lengths)
        self._world, self._rank, self._steps, self._start, self._origin = world, rank, steps, start, origin

    def batch(self, step: int) -> list[Item]:
        """The items of one step of the run."""
        items = []
        for source in self._sampling.chosen(step):
            size = self._batch_sizes[source]
            first = self.position(step, source) + self._rank * size
            items += [self._streams[source][position] for position in range(first, first + size)]
        return items

    def position(self, step: int, source: str) -> int:
        """Of the first sample of a source that no step before this one has taken, on any rank."""
        taken = self._sampling.count(step, source) - self._sampling.count(self._origin.step, source)
        return self._origin.positions.get(source, 0) + taken * self._world * self._batch_sizes[source]

    def __iter__(self) -> Iterator[list[Item]]:
        first = self._start()
        return map(self.batch, range(first, first + self._steps))

    def __len__(self) -> int:
        return self._steps


@final
class EvalSampler(Sampler[list[Item]]):
    """Every sample exactly once over all ranks, in pass 0: batches of one source, the sources in turn.

    In turn, so that a limited evaluation sees every source.

    Rank r of W takes the indices r, r + W, ... of each source, unpadded, so ranks may have different numbers of
    batches. A rank without a sample, where others have some, has one batch of nothing: Lightning would leave out its
    whole evaluation, and with it the sums over ranks.

    Args:
        lengths: samples a source; 0 leaves it out.
        batch_sizes: samples a batch, a source.
        world: number of ranks.
        rank: this one.
    """

    def __init__(self, lengths: Mapping[str, int], batch_sizes: Mapping[str, int], *, world: int, rank: int) -> None:
        of_source = [
            [
                [(source, 0, index) for index in indices[first : first + batch_sizes[source]]]
                for indices in [range(rank, length, world)]
                for first in range(0, len(indices), batch_sizes[source])
            ]
            for source, length in lengths.items()
        ]
        self._batches = [batch for turn in zip_longest(*of_source) for batch in turn if batch is not None]
        if not self._batches and any(lengths.values()):
            self._batches = [[]]

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
