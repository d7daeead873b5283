"""Tensors that are still in their file: of torch and safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from densectx.archive import check_bomb, why
from densectx.errors import CheckpointError


@final
@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is needed.

    Attributes:
        shape: its dimensions.
        read: gives it, each time anew.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def then(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Lazy:
        """What a function makes of it, of another shape."""
        return Lazy(shape, lambda: change(self.read()))

    def reshaped(self, shape: tuple[int, ...]) -> Lazy:
        """The same numbers in another shape."""
        return self.then(shape, lambda tensor: tensor.reshape(shape))


@contextmanager
def open_weights(path: str | Path) -> Iterator[dict[str, Lazy]]:
    """The tensors by name of a safetensors file or of one of torch (``weights_only``), for a ``with`` block.

    Files that torch has written since version 1.6 are mapped, older ones have to be read as a whole. A mapping under
    ``state_dict`` is taken in place of the file.

    Raises:
        CheckpointError: missing, unreadable, or no mapping of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as opened:
                shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - not a mapping
                yield {key: Lazy(shape, partial(opened.get_tensor, key)) for key, shape in shapes.items()}
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}.") from error
        return
    state = _loaded(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds a {type(state).__name__} without tensors, expected a state dict.")
    yield {
        str(key): Lazy(tuple(value.shape), partial(Tensor.detach, value))
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _loaded(path: Path) -> object:
    try:
        with path.open("rb") as file:
            check_bomb(file)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path}: cannot be read as a file of torch: {why(error)}") from error
