"""What a loader process does for one sample: read, augment, mix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch.utils.data import Dataset as TorchDataset

from densectx.data.base import Dataset
from densectx.data.corrupt import Corrupt
from densectx.data.draws import happens, integer
from densectx.data.mix import cutmix
from densectx.data.progress import Progress
from densectx.data.streams import Item
from densectx.data.transforms import Augment
from densectx.errors import DataError
from densectx.rng import generator
from densectx.types import Sample


@final
class Items(TorchDataset[tuple[str, Sample]]):
    """:data:`densectx.data.streams.Item` to ``(source, sample)`` with ``key``.

    Everything random is counted from (seed, source, pass, index): nothing depends on workers, ranks or batches.

    Args:
        datasets: by source name.
        augments: of each source, None for none.
        seed: of the whole run.
        corrupt: passes over samples that cannot be read (``key`` then says which one was taken); None: they are
            errors.
        progress: told which sample a loader process reads.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        augments: Mapping[str, Augment | None],
        seed: int,
        corrupt: Corrupt | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._datasets, self._augments, self._seed, self._corrupt = dict(datasets), dict(augments), seed, corrupt
        self._progress = progress

    def __getitem__(self, item: Item) -> tuple[str, Sample]:
        source, pass_, index = item
        if self._progress is not None:
            self._progress.start(item)
        count = (self._seed, source, pass_, index)
        found, sample = self._augmented(source, index, generator(*count, "augment"))
        augment = self._augments[source]
        if augment is not None and augment.cutmix:
            rng = generator(*count, "cutmix")
            if happens(augment.cutmix, rng):
                other = integer(len(self._datasets[source]) - 1, rng)
                _, partner = self._augmented(source, other, generator(*count, "partner"))
                sample = cutmix(sample, partner, rng, augment.info)
        return source, {**sample, "key": torch.tensor([pass_, found])}

    def _augmented(self, source: str, index: int, rng: torch.Generator) -> tuple[int, Sample]:
        dataset, augment = self._datasets[source], self._augments[source]
        found, sample = self._corrupt.read(source, index) if self._corrupt else (index, dataset[index])
        if augment is None:
            return found, sample
        try:
            return found, augment(sample, rng)
        except DataError as error:
            raise DataError(f"{dataset.name(found)}: {error}") from None
