"""Writing safetensors one tensor at a time: memory of the largest, not of all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from densectx.errors import CheckpointError, StorageError
from densectx.published.tensors import Lazy

_NAMES: Final = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK: Final = 1 << 20  # numbers


def write_safetensors(
    path: str | Path,
    info: Mapping[str, Any],
    like: Mapping[str, Tensor],
    tensors: Mapping[str, Lazy],
    source: str | Path,
) -> None:
    """Write the weights of a model as a file that :func:`densectx.checkpoint.load` reads.

    It is written beside the target and renamed when it is whole and on the disk.

    Args:
        path: the file, replaced if it exists.
        info: the header, see :func:`densectx.checkpoint.header`.
        like: the model's state dict, for order, types and shapes; may be on the meta device.
        tensors: the weights by the same keys; each is read, converted to the model's type and forgotten.
        source: the file that they come from, for messages.

    Raises:
        CheckpointError: a tensor of another shape than its place, or with numbers that are not finite.
        StorageError: the file system refuses.
    """
    path = Path(path)
    # wide types first: every tensor begins at a multiple of its own width, as the format's own writer has it
    order = sorted(like, key=lambda key: (-like[key].element_size(), key))
    places: dict[str, Any] = {"__metadata__": {"densectx": json.dumps(info)}}
    end = 0
    for key in order:
        begin, end = end, end + prod(like[key].shape) * like[key].element_size()
        places[key] = {"dtype": _NAMES[like[key].dtype], "shape": list(like[key].shape), "data_offsets": [begin, end]}
    head = json.dumps(places, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(len(head).to_bytes(8, "little") + head)
                for key in order:
                    _write(file, tensors[key].read(), like[key], f"{source}: {key}")
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            part.chmod(0o666 & ~umask)  # a temporary file is readable by its owner alone
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}; free space or choose another -o."
        ) from error


def _write(file: BinaryIO, tensor: Tensor, like: Tensor, what: str) -> None:
    if tensor.shape != like.shape:
        raise CheckpointError(f"{what} has the shape {tuple(tensor.shape)}, expected {tuple(like.shape)}.")
    flat = tensor.detach().reshape(-1)
    for first in range(0, len(flat), _CHUNK):
        values = flat[first : first + _CHUNK].to(like.dtype).contiguous()
        if not values.isfinite().all():
            raise CheckpointError(f"{what} has numbers that are not finite (NaN or infinity).")
        file.write(values.view(torch.uint8).numpy().data)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
