"""Weights of a ``.caffemodel``, without Caffe: the layers' blobs, found by seeking and read one at a time.

Field numbers from Caffe's ``caffe.proto``: NetParameter ``layer`` (100) and the older ``layers`` (2), LayerParameter
``name`` (1) and ``blobs`` (7), V1LayerParameter ``name`` (4) and ``blobs`` (6), BlobProto ``shape`` (7), ``data`` (5),
``double_data`` (8) and the older ``num``, ``channels``, ``height``, ``width`` (1 to 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from densectx.errors import CheckpointError
from densectx.published.wire import BYTES, FIXED32, FIXED64, VARINT, Field, Wire

_LAYER_FIELDS: Final = {100: (1, 7), 2: (4, 6)}  # field of the net: fields of the layer's name and blobs
_DATA, _SHAPE, _DOUBLE_DATA, _LEGACY = 5, 7, 8, (1, 2, 3, 4)
_MOST_DIMENSIONS: Final = 32  # Caffe's own limit
_CHUNK: Final = 1 << 20  # numbers


class _Span(NamedTuple):
    """Numbers in the file: where the first begins, how many, bytes of each, bytes from one to the next."""

    start: int
    numbers: int
    width: int
    step: int


@final
@dataclass(frozen=True)
class Blob:
    """An array of a layer, still in the file.

    Attributes:
        shape: its dimensions, those of PyTorch's layers (Caffe's layouts are the same).
        legacy: whether they are the four of old files, padded with ones in front.
        spans: where its numbers are.
    """

    shape: tuple[int, ...]
    legacy: bool
    spans: tuple[_Span, ...]


@final
class CaffeModel:
    """The layers of an opened ``.caffemodel`` that have weights.

    Attributes:
        path: of the file.
        layers: name -> its blobs, in the order of the file; for a convolution weight and bias.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire, self.path = wire, wire.path
        self.layers: dict[str, tuple[Blob, ...]] = {}
        seen = 0
        for field in wire.fields(0, wire.size, "the net"):
            if field.number not in _LAYER_FIELDS:
                continue
            seen += 1
            wire.expect(field, (BYTES,), f"layer {seen}")
            name, blobs = self._layer(field, *_LAYER_FIELDS[field.number], f"layer {seen}")
            if blobs and name in self.layers:
                wire.fail(f"two layers are called {name!r}")
            if blobs:
                self.layers[name] = blobs
        if not self.layers:
            wire.fail(f"none of its {seen} layers has weights" if seen else "it has no layers")

    def read(self, blob: Blob) -> Tensor:
        """The numbers of a blob of this file, float32, in its shape.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        values = np.empty(prod(blob.shape), np.float32)
        done = 0
        for span in blob.spans:
            for first in range(0, span.numbers, _CHUNK):
                take = min(_CHUNK, span.numbers - first)
                size = take * span.step - (span.step - span.width)  # no tag behind the last
                raw = np.frombuffer(self._wire.read(span.start + first * span.step, size), np.uint8)
                kind = np.dtype("<f4" if span.width == 4 else "<f8")
                found = np.ndarray(take, kind, raw, strides=(span.step,))
                with np.errstate(over="ignore"):  # what is too large is found later, as not finite
                    values[done : done + take] = found
                done += take
        return torch.from_numpy(values).reshape(blob.shape)

    def _layer(self, layer: Field, name_field: int, blobs_field: int, where: str) -> tuple[str, tuple[Blob, ...]]:
        name = where
        blobs: list[Blob] = []
        for field in self._wire.fields(layer.start, layer.stop, where):
            if field.number == name_field:
                self._wire.expect(field, (BYTES,), f"the name of {where}")
                if field.stop - field.start > 4096:
                    self._wire.fail(f"the name of {where} has {field.stop - field.start} bytes")
                try:
                    name = self._wire.read(field.start, field.stop - field.start).decode()
                except UnicodeDecodeError:
                    self._wire.fail(f"the name of {where} is no text")
            elif field.number == blobs_field:
                self._wire.expect(field, (BYTES,), f"blob {len(blobs)} of {where}")
                blobs.append(
                    self._blob(field, f"blob {len(blobs)} of {where}" + (f" ({name})" if name != where else ""))
                )
        return name, tuple(blobs)

    def _blob(self, blob: Field, where: str) -> Blob:
        shape: list[int] | None = None
        legacy: dict[int, int] = {}
        spans: dict[int, list[_Span]] = {_DATA: [], _DOUBLE_DATA: []}
        for field in self._wire.fields(blob.start, blob.stop, where):
            if field.number in spans:
                spans[field.number].append(self._span(field, where))
            elif field.number == _SHAPE:
                self._wire.expect(field, (BYTES,), f"the shape of {where}")
                if shape is not None:
                    self._wire.fail(f"{where} has two shapes")
                shape = self._shape(field, where)
            elif field.number in _LEGACY:
                self._wire.expect(field, (VARINT,), f"dimension {field.number} of {where}")
                legacy[field.number] = _signed(field.value)
        dimensions = [legacy.get(number, 0) for number in _LEGACY] if legacy else shape or []
        if any(size < 0 for size in dimensions):
            self._wire.fail(f"{where} has the shape {_said(dimensions)}, with a negative dimension")
        found = spans[_DOUBLE_DATA] or spans[_DATA]  # Caffe's order
        count = sum(span.numbers for span in found)
        if count != prod(dimensions):
            self._wire.fail(f"{where} has {count} numbers, its shape {_said(dimensions)} needs {prod(dimensions)}")
        return Blob(tuple(dimensions), bool(legacy), tuple(found))

    def _shape(self, shape: Field, where: str) -> list[int]:
        found: list[int] = []
        for field in self._wire.fields(shape.start, shape.stop, f"the shape of {where}"):
            if field.number == 1:
                self._wire.expect(field, (VARINT, BYTES), f"the shape of {where}")
                found += map(_signed, self._wire.varints(field, _MOST_DIMENSIONS, f"the shape of {where}"))
            if len(found) > _MOST_DIMENSIONS:
                self._wire.fail(f"{where} has more than {_MOST_DIMENSIONS} dimensions")
        return found

    def _span(self, field: Field, where: str) -> _Span:
        width, single = (4, FIXED32) if field.number == _DATA else (8, FIXED64)
        self._wire.expect(field, (BYTES, single), f"the data of {where}")
        if field.wire == single:
            return _Span(field.start, field.rows, width, width + 1)
        count, rest = divmod(field.stop - field.start, width)
        if rest:
            self._wire.fail(f"the data of {where} are {field.stop - field.start} bytes, no multiple of {width}")
        return _Span(field.start, count, width, width)


@contextmanager
def open_caffemodel(path: str | Path) -> Iterator[CaffeModel]:
    """A ``.caffemodel`` for a ``with`` block.

    Memory: the list of layers, and what :meth:`CaffeModel.read` returns.

    Raises:
        CheckpointError: missing, unreadable, damaged, or no Caffe model.
    """
    path = Path(path)
    if not path.is_file():  # a pipe or device cannot be read by seeking
        raise CheckpointError(f"{path}: no such file.")
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}.") from error
    with file:
        yield CaffeModel(Wire(file, path))


def _signed(value: int) -> int:
    """The int64 of a varint."""
    return value - 2**64 if value >= 2**63 else value


def _said(dimensions: list[int]) -> str:
    return "(" + ", ".join(map(str, dimensions)) + ")"
