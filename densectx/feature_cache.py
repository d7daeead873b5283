"""Features of frozen layers, computed once for every input and kept on disk (stage 2 of Yu & Koltun 2016, section 5).

An entry belongs to the content of one input, told by the SHA-256 of its numbers, and to everything that its features
depend on: the frozen weights, told by the SHA-256 of theirs, the config of the layers and the precision. So nothing is
ever taken for what it is not: an input that is augmented otherwise, or another front end, has other entries. A damaged
entry is seen by a checksum, said on stderr and made anew. Entries are written whole or not at all, under a name of
their own first, so any number of processes may share a folder; nothing is ever deleted from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final, final

import safetensors.torch
import torch
from torch import Tensor, nn

from densectx import __version__
from densectx.errors import ConfigError, StorageError
from densectx.model import DenseModel, without_weights
from densectx.nn.modes import evaluating

_MAGIC: Final = b"dctxfeat1"  # the number is the format's
_CHECKSUM: Final = 4  # bytes of the CRC-32 behind it


@final
class FeatureCache:
    """A folder of what backbone and projection make of inputs: the features that the context module reads.

    Features are computed one input at a time, so that an entry does not depend on the batch it came in, and a batch
    may be larger than what the frozen layers could process at once. Convolutions of a batch may round otherwise than
    those of its images: only with batches of one is training the same to the bit as without a cache.

    Args:
        folder: made when the first entry is written.
        model: whose frozen layers they are.
        frozen: the modules that are not trained.
        memory_format: of the features, whether they are computed or read: contexts round otherwise in another one.

    Attributes:
        read: inputs whose features were found.
        computed: inputs whose features were not.

    Raises:
        ConfigError: the features are not the same whenever an input comes back, or a head needs more than them.
    """

    def __init__(
        self,
        folder: str,
        model: DenseModel,
        frozen: Sequence[nn.Module],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        _check(model, frozen)
        self._memory_format = memory_format
        self.folder = Path(folder).expanduser()
        self.read = self.computed = 0
        self._layers = (model.backbone, model.projection)
        self._config = {key: model.config.get(key) for key in ("backbone", "projection", "norm")}
        self._weights: tuple[Any, bytes] = (None, b"")

    @torch.no_grad()
    def __call__(self, x: Tensor, surround: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of a batch.

        Args:
            x: (B, C, H, W), the trunk's input.
            surround: pixels of it on each side that are its surroundings.
            compute: (1, C, H, W) -> (1, K, h, w), the features of the last level.

        Returns:
            (B, K, h, w) on the device of x.

        Raises:
            StorageError: an entry cannot be written.
        """
        autocast = torch.is_autocast_enabled(x.device.type)
        how = [surround, str(torch.get_autocast_dtype(x.device.type)) if autocast else "as it is"]
        state = self._state()
        found = []
        for row in x.chunk(len(x)):
            name = hashlib.sha256(state + json.dumps([how, str(row.dtype), *row.shape]).encode() + _digest(row))
            entry = self.folder / name.hexdigest()[:2] / f"{name.hexdigest()[2:]}.features"
            kept = _load(entry)
            if kept is None:
                with evaluating(*self._layers):
                    kept = compute(row)
                self._store(entry, kept)
                self.computed += 1
            else:
                self.read += 1
            found.append(kept.to(x.device, memory_format=self._memory_format))
        return torch.cat(found)

    def _state(self) -> bytes:
        """What tells these layers from others; their weights are read again only where they were written to."""
        tensors = [
            (f"{place}.{name}", tensor.detach())
            for place, layer in enumerate(self._layers)
            for name, tensor in chain(layer.named_parameters(), layer.named_buffers())
        ]
        version = [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors]
        if self._weights[0] != version:
            said = [__version__, without_weights(self._config), *(str(layer) for layer in self._layers)]
            total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
            for name, tensor in tensors:
                total.update(json.dumps([name, str(tensor.dtype), *tensor.shape]).encode() + _digest(tensor))
            self._weights = (version, total.digest())
        return self._weights[1]

    def _store(self, entry: Path, features: Tensor) -> None:
        payload = safetensors.torch.save({"features": features.cpu().contiguous()})
        part = entry.with_name(f".{entry.stem}.{os.getpid()}.{secrets.token_hex(4)}.part")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(b"".join([_MAGIC, zlib.crc32(payload).to_bytes(_CHECKSUM, "big"), payload]))
                os.replace(part, entry)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StorageError(
                f"model.cache_features: {self.folder} cannot be written ({error.strerror or error}); free space, name"
                " another folder, or leave cache_features out."
            ) from error


def _check(model: DenseModel, frozen: Sequence[nn.Module]) -> None:
    where = "model.cache_features"
    needed = {"backbone": model.backbone, "projection": model.projection}
    open_ = [
        name
        for name, layer in needed.items()
        if not any(layer is other for other in frozen) and (name == "backbone" or any(True for _ in layer.parameters()))
    ]
    if open_:
        raise ConfigError(
            f"features of layers that are trained change at every step, and {' and '.join(open_)} is not frozen; set"
            " model.freeze: [backbone, projection], or leave cache_features out.",
            where,
        )
    if model.kinds or model.ablate:
        said = "norm: per_input has features for each kind of input" if model.kinds else "ablate leaves no features"
        raise ConfigError(f"model.{said}; leave one of the two out.", where)
    for key in model.tasks:
        task = model.task(key)
        if task.head.reads_pyramid:
            raise ConfigError(
                f"the head of task {key!r} reads the backbone's finer levels, which are not kept; take head linear or"
                " upsample, or leave cache_features out.",
                where,
            )
        if not task.unchanged:
            raise ConfigError(
                f"task {key!r} changes its input (by noise, by reduction), so that none comes back and the folder would"
                " only grow; leave cache_features out.",
                where,
            )


def _digest(tensor: Tensor) -> bytes:
    """SHA-256 of the numbers of a tensor, whatever its device and memory format."""
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()


def _load(entry: Path) -> Tensor | None:
    """None where there is no entry, or a damaged one, which is said."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + _CHECKSUM
    payload = content[start:]
    if (
        content[: len(_MAGIC)] != _MAGIC
        or len(content) < start
        or zlib.crc32(payload) != int.from_bytes(content[len(_MAGIC) : start], "big")
    ):
        sys.stderr.write(f"densectx: warning: model.cache_features: {entry} is damaged; computed again.\n")
        sys.stderr.flush()
        return None
    return safetensors.torch.load(payload)["features"]
