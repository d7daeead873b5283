"""A bound on what may be allocated while something is built by what a file says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from densectx.errors import CheckpointError

_FACTORIES: Final = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.empty_strided}
_SPARE: Final = 128 << 20  # bytes, for what is computed while a network is built


@final
class Budget(TorchFunctionMode):
    """A context in which new tensors may have four times the bytes of some given ones, and 128 MiB.

    Memory is taken when it is first written to, which comes after the tensor was made: what is too large is refused
    before it costs any.

    Args:
        given: the tensors that what is built is to hold.

    Raises:
        CheckpointError: more is asked for; without the name of the file.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.left = _SPARE + 4 * sum(tensor.nbytes for tensor in given)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call, and count what is new."""
        result = func(*args, **(kwargs or {}))
        if func in _FACTORIES and isinstance(result, Tensor) and result.device.type != "meta":
            self.left -= result.nbytes
            if self.left < 0:
                raise CheckpointError("the model that it describes is far larger than the weights that it holds.")
        return result
