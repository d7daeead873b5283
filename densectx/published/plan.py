"""Which tensor of a published file goes where in a network of ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from densectx.checkpoint import from_header, read
from densectx.errors import CheckpointError
from densectx.model import DenseModel
from densectx.model_names import provided
from densectx.published.tensors import Lazy


@final
@dataclass(frozen=True)
class Net:
    """A network that is to be filled.

    Attributes:
        name: in the registry of models.
        config: its model config, sources included.
        model: built on the meta device: names and shapes, no numbers.
    """

    name: str
    config: Mapping[str, Any]
    model: DenseModel

    @classmethod
    def of(cls, name: str, distribution: str = "", **backbone: Any) -> Net:
        """A registered model, whether it comes as a config or as a file with weights.

        Args:
            name: in the registry of models.
            distribution: that provides it, for a name that no user chose: others may provide it too.
            backbone: options of its backbone to set.

        Raises:
            ConfigError: unknown name.
            CheckpointError, PluginError: its file or its parts are missing, or its package is broken.
        """
        found = provided(f"{distribution}/{name}" if distribution else name)
        info = {"model": found} if isinstance(found, Mapping) else read(found)[1]
        config = dict(info["model"])
        given = config["backbone"]
        config["backbone"] = {**({"name": given} if isinstance(given, str) else given), **backbone}
        with torch.device("meta"):
            return cls(name, config, from_header({**info, "model": config}, name))

    @property
    def state(self) -> dict[str, Tensor]:
        """Its state dict, without numbers."""
        return dict(self.model.state_dict())

    def fresh(self, keys: Collection[str]) -> dict[str, Lazy]:
        """Some of its weights as it starts with, the same at each call; needs the memory of the network meanwhile."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            state = from_header({"model": self.config}, self.name).state_dict()
        kept = {key: state[key].clone() for key in keys}
        return {key: Lazy(tuple(value.shape), value.clone) for key, value in kept.items()}


@final
@dataclass(frozen=True)
class Plan:
    """What a conversion does.

    Attributes:
        net: that is filled.
        taken: {key of the net: tensor of the file}.
        names: of what was taken, as the file calls it.
        fresh: keys of the net that the file has nothing for.
        left: what else the file has.
        notes: sentences for the user.
    """

    net: Net
    taken: Mapping[str, Lazy]
    names: Sequence[str]
    fresh: Sequence[str] = ()
    left: Sequence[str] = ()
    notes: Sequence[str] = ()


def match(
    path: Path,
    net: Net,
    wanted: Mapping[str, str],
    given: Mapping[str, Lazy],
    *,
    optional: Collection[str] = (),
    flat: bool = False,
) -> tuple[dict[str, Lazy], list[str]]:
    """Find the weights of a network in a file, by name and shape.

    Args:
        path: of the file, for messages.
        net: the network.
        wanted: {key of the network: name in the file}.
        given: the file's tensors by name.
        optional: keys that may be missing in the file.
        flat: whether a convolution's weight may be the matrix of a fully connected layer, and any shape be padded with
            ones in front, as in old Caffe files.

    Returns:
        {key: tensor} of what was found, and the keys that have to be fresh.

    Raises:
        CheckpointError: missing or differently shaped tensors, grouped.
    """
    state = net.state
    fresh = [key for key in state if key in optional and wanted.get(key) not in given]
    missing = [wanted.get(key, key) for key in state if key not in fresh and wanted.get(key) not in given]
    taken: dict[str, Lazy] = {}
    wrong = []
    for key, name in wanted.items():
        if key not in state or name not in given:
            continue
        shape = tuple(state[key].shape)
        fits = given[name].shape == shape or (flat and _flat(given[name].shape, shape))
        if fits:
            taken[key] = given[name] if given[name].shape == shape else given[name].reshaped(shape)
        else:
            wrong.append(f"{name} is {_said(given[name].shape)}, not {_said(shape)}")
    if missing or wrong:
        parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
        parts += [f"{len(wrong)} of another shape ({_some(wrong)})"] if wrong else []
        raise CheckpointError(f"{path}: does not fit net {net.name}: of its {len(state)} tensors {'; '.join(parts)}.")
    return taken, fresh


def _flat(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    bare = _bare(given)
    return bare == _bare(shape) or (len(shape) == 4 and bare == _bare((shape[0], prod(shape[1:]))))


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones in front."""
    first = next((index for index, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def _said(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if names[4:] else "")
