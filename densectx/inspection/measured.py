"""The field as it is measured: which inputs have a gradient, on a thin copy with positive weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densectx.errors import ConfigError
from densectx.inspection.extent import Extent
from densectx.inspection.thin import Shared, Thin, thin_copy


@final
@dataclass(frozen=True)
class Support:
    """The inputs that one output position depends on.

    Attributes:
        position: (row, column) of the output.
        rows: bool, one an input row: whether any pixel in it has a gradient.
        columns: the same along the width.
    """

    position: tuple[int, int]
    rows: NDArray[np.bool_]
    columns: NDArray[np.bool_]

    @property
    def first(self) -> tuple[int, int]:
        """First row and first column."""
        return int(self.rows.argmax()), int(self.columns.argmax())

    @property
    def last(self) -> tuple[int, int]:
        """Last row and last column."""
        return len(self.rows) - 1 - int(self.rows[::-1].argmax()), len(self.columns) - 1 - int(
            self.columns[::-1].argmax()
        )

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns from the first to the last."""
        (top, left), (bottom, right) = self.first, self.last
        return bottom - top + 1, right - left + 1


def supports(
    module: nn.Module,
    shape: Sequence[int],
    positions: Callable[[int, int], Sequence[tuple[int, int]]] | None = None,
    run: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> list[Support]:
    """Where the gradient of output positions is not zero, on a thin copy of a network.

    In the copy every convolution is a mean over its input channels and its taps, in float64; norms, activations, powers
    and dropout do nothing and a max-pool is a mean. Nothing cancels, so that the gradient vanishes exactly where no
    path leads, and a pass costs about one channel a layer.

    An axis needs no more of the other one than that some path is left: a strip of a few cells is enough for
    convolutions of odd kernels, whose middle tap stays inside; see :func:`measured`.

    Args:
        module: any network; weights are neither read nor changed, and may be on the meta device.
        shape: (B, C, H, W) of the input.
        positions: (height, width) of the output -> (row, column) of those to look at; the middle one if left out.
        run: ``run(module, x)`` gives the (B, K, h, w) output; ``module(x)`` if left out.

    Raises:
        ConfigError: the network uses indices of a max-pool, which a mean does not have.
    """
    thin = thin_copy(module)
    x = torch.ones(tuple(shape), dtype=torch.float64, requires_grad=True)
    try:
        with Thin():
            output = thin(x) if run is None else run(thin, x)
    except Shared:
        with Thin(shared=False):
            output = thin(x) if run is None else run(thin, x)
    height, width = output.shape[-2:]
    # channels of an answer may be p and 1 - p: with weights of their own not even those cancel
    weight = torch.rand(output.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    found = []
    for row, column in [(height // 2, width // 2)] if positions is None else positions(height, width):
        (gradient,) = torch.autograd.grad((output[..., row, column] * weight).sum(), x, retain_graph=True)
        seen = (gradient != 0).any(0).any(0)
        found.append(Support((row, column), seen.any(1).numpy(), seen.any(0).numpy()))
    return found


class Measured(NamedTuple):
    """The inputs that one output position depends on along one axis.

    Attributes:
        position: of the output.
        first: input pixel.
        last: input pixel.
        connected: how many of those from ``first`` to ``last`` have a gradient.
        expected: (first, last) as an :class:`densectx.inspection.geometry.Extent` says.
    """

    position: int
    first: int
    last: int
    connected: int
    expected: tuple[int, int]

    @property
    def field(self) -> int:
        """Pixels from the first to the last."""
        return self.last - self.first + 1

    @property
    def agrees(self) -> bool:
        """Whether it is what is expected."""
        return (self.first, self.last) == self.expected


def measured(
    module: nn.Module,
    channels: int,
    cell: int,
    extent: Extent,
    axis: int,
    run: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Measured:
    """The field of an output in the middle along one axis, of the phase that sees most, on a strip of its length.

    The strip gets wider (2, 8, 32 cells) until nothing is missing of what is expected: what is seen can only grow by
    that, never beyond what the whole plane shows. An even dilated kernel, for one, has no tap on a line of one cell.

    Args:
        module: as for :func:`supports`.
        channels: of the input.
        cell: input sizes are multiples of it.
        extent: what is expected of the output, finite.
        axis: 0 for rows, 1 for columns.
        run: as for :func:`supports`.
    """
    reach = max(*extent.last, *(extent.step - first for first in extent.first))
    length = 2 * -(-(reach + cell) // cell) * cell
    spans = [last - first for first, last in zip(extent.first, extent.last, strict=True)]
    phase = spans.index(max(spans))

    def middle(height: int, width: int) -> list[tuple[int, int]]:
        place = [height // 2, width // 2]
        place[axis] += phase - place[axis] % extent.period
        return [(place[0], place[1])]

    found: Measured | None = None
    for cells in (2, 8, 32):
        sides = [cells * cell, cells * cell]
        sides[axis] = length
        support = supports(module, (1, channels, *sides), middle, run)[0]
        seen, place = (support.rows, support.columns)[axis], support.position[axis]
        base = place // extent.period * extent.step
        expected = (base + extent.first[phase], base + extent.last[phase])
        if seen.any():
            found = Measured(place, support.first[axis], support.last[axis], int(seen.sum()), expected)
            if found.agrees:
                break
    if found is None:
        raise ConfigError("the field cannot be measured: the middle of the output depends on no input.")
    return found
