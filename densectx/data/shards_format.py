"""How a sample lies in a shard: what its members are, and the way back to the very tensors.

A shard is a plain tar file (ustar) in WebDataset's layout; a sample is consecutive members of one key:

``<key>.image.jpg``, ``<key>.mask.png``, ``<key>.target.mat``
    the file that the data set read, byte for byte, where the fixed rule below gives the very tensor of the sample;
``<key>.image.png``, ``<key>.mask.png``
    else, where it is exact: images of 8 bits as PNG, class ids (after remap and colours) as gray PNG;
``<key>.target.npy``
    else the tensor as it is, whole numbers in the smallest type that holds them (uint8, uint16);
``<key>.json``
    ``name`` of the sample in its data set, ``gray``, and ``tensors``: the keys that were encoded anew.

The rule for files: ``image`` (and a ``target`` that is a picture) by :func:`densectx.data.reader.read_image` with the
source's channels and value range; ``mask`` by :func:`densectx.data.labels.read_mask`, ``.mat`` files by ``read_sbd``;
maps by :func:`densectx.data.labels.read_field`, ``.mat`` files by ``read_boundaries``. What the writer keeps is
compared bit by bit with the sample, so that nothing rests on this rule alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from densectx.data.arrays import mapped
from densectx.data.blob import Blob, suffix_of
from densectx.data.labels import read_boundaries, read_field, read_mask, read_sbd
from densectx.data.reader import read_image
from densectx.errors import DataError
from densectx.types import Sample, SourceInfo

DTYPES = {
    "image": torch.float32,
    "mask": torch.int64,
    "target": torch.float32,
    "valid": torch.bool,
    "surround": torch.int64,
}
"""Of the keys of a sample that a shard can hold, beside ``gray``."""


@final
class Packed(NamedTuple):
    """A sample as members: extension (``image.jpg``) -> content, the JSON last; how many are files as they were."""

    members: dict[str, bytes]
    files: int


def pack(sample: Sample, name: str, paths: Mapping[str, str], info: SourceInfo) -> Packed:
    """A sample as the members of a shard, each of which :func:`unpack` turns into the very tensor.

    Args:
        sample: of a data set.
        name: what it is called.
        paths: files of its keys, as far as it has some.
        info: of the source.

    Raises:
        DataError: a file cannot be read, or the sample has something that is no tensor of its type.
    """
    members: dict[str, bytes] = {}
    tensors = []
    for key, tensor in sample.items():
        if key == "gray":
            continue
        if key not in DTYPES or tensor.dtype != DTYPES[key]:
            raise DataError(f"{name}: {key!r} is {tensor.dtype}; shards hold {', '.join(DTYPES)} of their types.")
        found = _as_file(key, tensor, paths.get(key), info)
        if found is None:
            found = _as_tensor(key, tensor)
            tensors.append(key)
        members[f"{key}{found[0]}"] = found[1]
    gray = bool(sample.get("gray", len(sample["image"]) == 1))  # as of samples that are collated
    head = {"gray": gray, "name": name, "tensors": tensors}
    files = len(members) - len(tensors)
    return Packed({**members, "json": json.dumps(head).encode("ascii")}, files)


def unpack(key: str, blob: Blob, *, encoded: bool, info: SourceInfo) -> Tensor:
    """The tensor of a member.

    Args:
        key: of the sample: ``image``, ``mask``, ...
        blob: content; the suffix of its name tells the kind of file.
        encoded: whether it is the tensor itself, else the data set's file.
        info: of the source.

    Raises:
        DataError: it cannot be read.
    """
    if not encoded:
        return _read(key, blob, info)
    if suffix_of(blob) == ".npy":
        try:
            values = np.array(mapped(blob))
        except Exception as error:  # NumPy raises many kinds on damaged files
            raise DataError(f"{blob}: damaged ({error}); write the shards again.") from None
        return torch.from_numpy(values.astype(np.int64) if values.dtype == np.uint16 else values).to(DTYPES[key])
    return read_mask(blob) if key == "mask" else read_image(blob, info.channels)[0]


def _read(key: str, blob: Blob, info: SourceInfo) -> Tensor:
    """A file of a data set by the rule of its key."""
    matlab = suffix_of(blob) == ".mat"
    if key == "mask":
        return read_sbd(blob) if matlab else read_mask(blob)
    if key == "target" and info.target != "image":
        return read_boundaries(blob) if matlab else read_field(blob).float()
    return read_image(blob, info.channels, info.value_range)[0]


def _as_file(key: str, tensor: Tensor, path: str | None, info: SourceInfo) -> tuple[str, bytes] | None:
    """Suffix and content of the sample's own file; None if it has none, or one that says something else."""
    if path is None:
        return None
    suffix = suffix_of(path)
    try:
        with open(path, "rb") as file:
            content = file.read()
        return (suffix, content) if _same(_read(key, Blob(path, content), info), tensor) else None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}.") from None
    except DataError:  # the data set reads it in another way, such as colours
        return None


def _as_tensor(key: str, tensor: Tensor) -> tuple[str, bytes]:
    values = tensor.contiguous().numpy()
    if key == "image" and len(values) in (1, 3):
        levels = np.rint(values * 255)
        if levels.min() >= 0 and levels.max() <= 255:
            pixels = levels.astype(np.uint8)
            if _same(torch.from_numpy(pixels.astype(np.float32)).div_(255), tensor):
                return ".png", _png(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2))
    small = _smallest(values)
    if key == "mask" and small.dtype in (np.uint8, np.uint16):
        return ".png", _png(small)
    buffer = io.BytesIO()
    np.save(buffer, small, allow_pickle=False)
    return ".npy", buffer.getvalue()


def _smallest(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in the smallest of uint8 and uint16 that holds them, else as they are."""
    for dtype in (np.uint8, np.uint16):
        with np.errstate(invalid="ignore"):
            small = values.astype(dtype)
        if small.astype(values.dtype).tobytes() == values.tobytes():  # also tells -0.0 from 0.0, and NaN
            return small
    return values


def _png(pixels: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, so that NaN equals NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    )
