"""An operation that ran, as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

from torch import Tensor

from densectx.inspection.spans import Spans

Result: TypeAlias = "Spans | list[Spans]"
"""Of the output, of all outputs alike; or of each output."""


@final
@dataclass(frozen=True)
class Call:
    """An operation that ran, seen along one axis.

    Attributes:
        name: ATen's, without ``aten::`` and the underscore of in-place variants.
        given: arguments by their names in the schema, defaults included.
        outputs: the tensors it answered with.
        layer: name of the module that it ran in.
        spans: of a tensor; None for one that does not depend on the input.
        values: numbers of an index tensor, None if they are not known.
        pools: kernel, stride and padding of the max-pool that a tensor of indices comes from.
    """

    name: str
    given: Mapping[str, Any]
    outputs: Sequence[Tensor]
    layer: str
    spans: Callable[[Tensor], Spans | None]
    values: Callable[[Tensor], Tensor | None] = field(repr=False)
    pools: Callable[[Tensor], tuple[list[int], list[int], list[int]] | None] = field(repr=False)

    def of(self, name: str) -> Spans:
        """The spans of an argument; a constant's see nothing."""
        tensor: Tensor = self.given[name]
        found = self.spans(tensor)
        return Spans.nothing(tensor.ndim) if found is None else found

    def number(self, *names: str) -> int:
        """A whole number, of the first argument of these names that the operation has."""
        return int(next(self.given[name] for name in names if name in self.given))

    def pair(self, name: str) -> list[int]:
        """A number a spatial dimension; one stands for all."""
        value = list(self.given[name])
        return value * 2 if len(value) == 1 else value


class Refused(Exception):
    """Why an operation cannot be followed with these arguments."""
