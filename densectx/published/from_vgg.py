"""``densectx convert vgg``: ImageNet's VGG-16 of torchvision, timm or Caffe into the paper's front end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from densectx.errors import ConfigError
from densectx.published.from_caffe import FRONT_END, caffe_layers, layers
from densectx.published.plan import Net, Plan, match
from densectx.published.tensors import Lazy, open_weights
from densectx.registry import BACKBONES

_CONVOLUTIONS: Final = (2, 2, 3, 3, 3)  # of each stage
_INDICES: Final = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of torchvision's and timm's `features`
_LINEAR: Final = {"classifier.0": "fc6", "classifier.3": "fc7", "pre_logits.fc1": "fc6", "pre_logits.fc2": "fc7"}


@final
@dataclass(frozen=True)
class Pixels:
    """What a file's first convolution reads: (RGB in 0..1 - mean) / std."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET: Final = Pixels("torchvision's and timm's", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FEATURES: Final = Pixels("torchvision's IMAGENET1K_FEATURES", (0.48235, 0.45882, 0.40784), (1 / 255,) * 3)


@contextmanager
def plan(path: Path, name: str | None) -> Iterator[Plan]:
    """How to fill a network's front end, for a ``with`` block in which the file stays open.

    Its pixels are BGR in 0..255 minus its own mean. The first convolution of torchvision's and timm's files is changed
    so that it answers for them as before for RGB / 255 standardised by ImageNet's statistics, exactly where there is no
    zero padding. A Caffe file is taken as it is: its pixels are BGR minus a mean too, and the paper subtracts the mean
    of each data set without changing it.

    Args:
        path: ``.caffemodel``, ``.safetensors``, or a file of torch.
        name: of the net; None for ``frontend_vgg16``.

    Raises:
        ConfigError: unknown net, or one without the paper's front end.
        CheckpointError: damaged file, one of another network, or other shapes.
    """
    net = Net.of("frontend_vgg16", "densectx") if name is None else Net.of(name)
    if f"{FRONT_END}conv1_1.weight" not in net.state:
        raise ConfigError(f"--net {net.name}: has no frontend_vgg16, which is what VGG-16 is converted into.")
    if path.suffix == ".caffemodel":
        with caffe_layers(path) as given:
            yield _planned(
                path, net, given, ["conv1_1 reads BGR minus a mean as it is; the net subtracts its own mean."]
            )
    else:
        with open_weights(path) as given:
            pixels, notes = IMAGENET, []
            if "classifier.0.bias" in given and given["classifier.0.bias"].read().isnan().any():
                pixels = FEATURES
                notes.append("its classifier is NaN, as in torchvision's IMAGENET1K_FEATURES: only features are taken.")
                given = {key: value for key, value in given.items() if not key.startswith("classifier.")}
            named = _renamed(given)
            if "conv1_1.weight" in named and "conv1_1.bias" in named:
                named |= folded(named["conv1_1.weight"], named["conv1_1.bias"], pixels, _mean(net))
                notes.append(f"conv1_1 is changed from {pixels.name} RGB to the net's BGR in 0..255 minus mean.")
            if not net.model.backbone.margin:
                notes.append("the net pads with zeros, which are other pixels now: conv1_1 differs at the very border.")
            yield _planned(path, net, named, notes)


def _planned(path: Path, net: Net, given: Mapping[str, Lazy], notes: Sequence[str]) -> Plan:
    wanted = {key: key.removeprefix(FRONT_END) for key in net.state if key.startswith(FRONT_END)}
    optional = [key for key in net.state if not key.startswith(f"{FRONT_END}conv")]  # fc6, fc7 and all behind
    taken, fresh = match(path, net, wanted, given, optional=optional, flat=True)
    names = layers(wanted[key] for key in taken)
    left = [name for name in given if name not in wanted.values()]
    return Plan(net, {**taken, **net.fresh(fresh)}, names, fresh=fresh, left=layers(left), notes=notes)


def folded(weight: Lazy, bias: Lazy, pixels: Pixels, mean: Sequence[float]) -> dict[str, Lazy]:
    """``conv1_1`` for BGR in 0..255 minus a mean, from one for standardised RGB.

    With z = 255 x - m for each channel of x in 0..1: (x - mean) / std = z / (255 std) + (m / 255 - mean) / std.

    Args:
        weight: (out, 3, kh, kw), input channels R, G, B.
        bias: (out,).
        pixels: what it reads.
        mean: m of B, G and R in 0..255.

    Raises:
        CheckpointError: it does not read three channels, when it is read.
    """
    channel = (1, 3, 1, 1)
    own = torch.tensor(tuple(mean), dtype=torch.float64).flip(0).view(channel)
    average = torch.tensor(pixels.mean, dtype=torch.float64).view(channel)
    std = torch.tensor(pixels.std, dtype=torch.float64).view(channel)

    def shifted(tensor: Tensor) -> Tensor:
        rest = weight.read().double() * ((own / 255 - average) / std)
        return (tensor.double() + rest.sum((1, 2, 3))).float()

    if len(weight.shape) != 4 or weight.shape[1] != 3 or bias.shape != weight.shape[:1]:
        return {}  # refused with what is expected, like every other shape
    return {
        "conv1_1.weight": weight.then(weight.shape, lambda w: (w.double() / (255 * std)).flip(1).float()),
        "conv1_1.bias": bias.then(bias.shape, shifted),
    }


def _renamed(given: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Tensors of torchvision's or timm's VGG-16 by the paper's names; others keep theirs."""
    stages = [f"conv{stage}_{number}" for stage, count in enumerate(_CONVOLUTIONS, 1) for number in range(1, count + 1)]
    names = {f"features.{index}": name for index, name in zip(_INDICES, stages, strict=True)} | _LINEAR
    found = {}
    for key, value in given.items():
        layer, dot, part = key.rpartition(".")
        found[f"{names.get(layer, layer)}{dot}{part}"] = value
    return found


def _mean(net: Net) -> Sequence[float]:
    """The mean that a net's front end subtracts: B, G, R in 0..255."""
    spec = net.config["backbone"]
    mean: Sequence[float] = spec.get("mean") or BACKBONES.options(spec["name"])["mean"].default
    return mean
