"""Samples of several sources to one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from densectx.errors import DataError
from densectx.types import Batch, Sample


@final
class Collate:
    """``[(source, sample)]`` to ``{source: collated sample}``.

    A label that only some samples of a source have is filled in for the others: integers with the source's
    ``ignore_index``, floats with NaN. A key that no sample has stays absent; ``gray`` is always there.

    Args:
        ignore: ``ignore_index`` of every source.
        fix: what the message about different sizes advises.
    """

    def __init__(self, ignore: Mapping[str, int], fix: str) -> None:
        self._ignore, self._fix = dict(ignore), fix

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
        samples = [{"gray": torch.tensor(False), **sample} for sample in samples]
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
        fill = float("nan") if present[0].is_floating_point() else self._ignore[source]
        empty = torch.full_like(present[0], fill) if len(present) < len(values) else present[0]
        return torch.stack([empty if value is None else value for value in values])
