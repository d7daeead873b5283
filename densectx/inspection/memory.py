"""What is known of tensors, and of the memory that they share: what one shows when another one is written."""

from __future__ import annotations

from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from densectx.errors import ConfigError
from densectx.inspection.spans import NONE, Spans

_LARGEST: Final = 1 << 24


@final
class ByIdentity(dict[int, Any]):
    """Values by tensor, which is kept alive so that its id is not used again."""

    def __setitem__(self, tensor: Any, value: Any) -> None:
        super().__setitem__(id(tensor), (tensor, value))

    def get(self, tensor: Any, default: Any = None) -> Any:
        """The value of a tensor."""
        found = super().get(id(tensor))
        return default if found is None else found[1]


@final
class Memory:
    """What each element of a tensor's storage sees along an axis; at first nothing.

    Args:
        tensor: any view of the storage, on any device.

    Raises:
        ConfigError: it is too large to follow element by element.
    """

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        if size > _LARGEST:
            raise ConfigError(f"the receptive field cannot be derived: {size} numbers are written in parts.")
        self.lo, self.hi, self.clean = np.full(size, NONE), np.full(size, -NONE), np.ones(size, bool)
        self.causes: tuple[str, ...] = ()

    def write(self, tensor: Tensor, spans: Spans) -> Memory:
        """Let the elements of a view see what is given; returns itself."""
        for array, values in ((self.lo, spans.lo), (self.hi, spans.hi), (self.clean, spans.clean)):
            _view(array, tensor)[...] = values
        self.causes = tuple(dict.fromkeys((*self.causes, *spans.causes)))
        return self

    def read(self, tensor: Tensor) -> Spans:
        """What a view sees; where rows or columns of a map do not go on evenly is a border."""
        lo, hi, clean = (_view(array, tensor).copy() for array in (self.lo, self.hi, self.clean))
        spans = Spans.compact(lo, hi, clean, self.causes)
        for dim in (2, 3) if tensor.ndim == 4 else ():
            spans = spans.ordered(dim)
        return spans


def _view(array: NDArray[Any], tensor: Tensor) -> NDArray[Any]:
    steps = [stride * array.itemsize for stride in tensor.stride()]
    return np.lib.stride_tricks.as_strided(array[tensor.storage_offset() :], tuple(tensor.shape), steps)
