"""Samples of several sources to one batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from densectx.data import geometry
from densectx.errors import DataError
from densectx.types import Batch, Sample, SourceInfo


@final
class Collate:
    """``[(source, sample)]`` to ``{source: collated sample}``.

    A label that only some samples of a source have is filled in for the others: integers with the source's
    ``ignore_index``, floats with NaN. A key that no sample has stays absent, but ``gray``: whether the image has one
    channel, of samples that do not say.

    Args:
        infos: of every source.
        fix: what the message about different sizes advises.
        pad: sources whose samples are enlarged to the greatest height and width in the batch, see
            :func:`densectx.data.geometry.pad`; they have ``valid``. The batch is that of a rank: with another number
            of ranks the same pixels may be surrounded by more or less padding.
    """

    def __init__(self, infos: Mapping[str, SourceInfo], fix: str, pad: Collection[str] = ()) -> None:
        self._infos, self._fix, self._pad = dict(infos), fix, frozenset(pad)

    def __call__(self, items: Sequence[tuple[str, Sample]]) -> Batch:
        """Stack samples, source by source in the order of their first appearance.

        Raises:
            DataError: samples of a source differ in size; the sizes and the source are named.
        """
        groups: dict[str, list[Sample]] = {}
        for source, sample in items:
            groups.setdefault(source, []).append(sample)
        return {source: self._stack(source, samples) for source, samples in groups.items()}

    def _stack(self, source: str, samples: list[Sample]) -> Sample:
        samples = [{"gray": torch.tensor(len(sample["image"]) == 1), **sample} for sample in samples]
        if source in self._pad:
            samples = _padded(samples, self._infos[source])
        keys = dict.fromkeys(key for sample in samples for key in sample)
        return {key: self._column(source, key, [sample.get(key) for sample in samples]) for key in keys}

    def _column(self, source: str, key: str, values: list[Tensor | None]) -> Tensor:
        present = [value for value in values if value is not None]
        shapes = list(dict.fromkeys(tuple(value.shape) for value in present))
        if len(shapes) > 1:
            sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
            raise DataError(
                f"data.sources.{source}: sizes differ within a batch ({key}: {sizes});"
                f" {self._fix.format(source=source)}."
            )
        fill = geometry.unlabelled(present[0], self._infos[source])
        empty = torch.full_like(present[0], fill) if len(present) < len(values) else present[0]
        return torch.stack([empty if value is None else value for value in values])


def _padded(samples: list[Sample], info: SourceInfo) -> list[Sample]:
    sizes = [geometry.size_of(sample) for sample in samples]
    largest = max(height for height, _ in sizes), max(width for _, width in sizes)
    return [{**sample, **geometry.pad(geometry.parts(sample, info), largest, info)} for sample in samples]
