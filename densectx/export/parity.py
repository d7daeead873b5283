"""Does what was written answer as the model does?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from densectx.errors import NumericError
from densectx.export.graph import Graph

SIZES = ((1, 61, 83), (3, 36, 25), (1, 5, 7))
"""Batch, height and width of the checks: none was recorded, the last is below what noise is estimated in."""

TOLERANCE = 1e-4

Answer: TypeAlias = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]
"""The written file: arguments of :class:`densectx.export.graph.Graph` to answers by task."""


class Parity(NamedTuple):
    """The largest difference that was found, and at how many inputs was looked."""

    difference: float
    inputs: int


@torch.no_grad()
def check(graph: Graph, answer: Answer) -> Parity:
    """Compare a file with its model at :data:`SIZES`, on noise; with options estimated where they can be, and given.

    The difference is absolute, and relative to the largest number of an answer where that is above 1 (metres).

    Raises:
        NumericError: a shape is another one, or a difference above :data:`TOLERANCE`; not a number is one.
    """
    worst, count = 0.0, 0
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in SIZES:
        image = torch.rand(batch, graph.channels, height, width, generator=generator)
        for options in [graph.unasked, *([_given(graph, image)] if graph.options else [])]:
            arguments = [image, *(torch.tensor(value) for value in options)]
            expected, found = graph(*arguments), answer(arguments)
            where = f"{batch} x {graph.channels} x {height} x {width}"
            for key, truth in expected.items():
                if found[key].shape != truth.shape:
                    raise NumericError(
                        f"task {key!r}: the file answers {tuple(found[key].shape)} to an image of {where}, the model"
                        f" {tuple(truth.shape)}; nothing is left of the file."
                    )
                difference = ((found[key] - truth).abs().max() / truth.abs().max().clamp_min(1)).item()
                if not difference <= TOLERANCE:
                    raise NumericError(
                        f"task {key!r}: the file and the model differ by {difference:.3g} at an image of {where}, above"
                        f" {TOLERANCE:g}; nothing is left of the file."
                    )
                worst = max(worst, difference)
            count += 1
    return Parity(worst, count)


def _given(graph: Graph, image: Tensor) -> list[float]:
    """A possible number for each option: about what would be estimated, or the default."""
    values = graph.model.resolve(image, graph.tasks).values()
    return [1.0 if value is None else float(value.mean() if isinstance(value, Tensor) else value) for value in values]
