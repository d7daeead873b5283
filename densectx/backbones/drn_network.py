"""The networks of Yu, Koltun & Funkhouser (2017, arXiv:1705.09914) with the module names of the published weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias, final, get_args

import torch
from torch import Tensor, nn

from densectx.types import Feature

Arch: TypeAlias = Literal["a_50", "c_26", "c_42", "c_58", "d_22", "d_38", "d_54", "d_105"]
"""The networks that have published weights, or code (A-50)."""

ARCHS: Final[tuple[Arch, ...]] = get_args(Arch)

_WIDTHS: Final = (16, 32, 64, 128, 256, 512, 512, 512)
_DILATIONS: Final = (1, 1, 1, 1, 2, 4, 2, 1)
_STRIDES: Final = (1, 2, 2, 2, 1, 1, 1, 1)


class _Layout(NamedTuple):
    """Family A, C or D, whether the blocks are bottlenecks, blocks of each layer."""

    family: Literal["a", "c", "d"]
    bottleneck: bool
    blocks: tuple[int, ...]


_LAYOUTS: Final[Mapping[Arch, _Layout]] = {
    "a_50": _Layout("a", True, (3, 4, 6, 3)),
    "c_26": _Layout("c", False, (1, 1, 2, 2, 2, 2, 1, 1)),
    "c_42": _Layout("c", False, (1, 1, 3, 4, 6, 3, 1, 1)),
    "c_58": _Layout("c", True, (1, 1, 3, 4, 6, 3, 1, 1)),
    "d_22": _Layout("d", False, (1, 1, 2, 2, 2, 2, 1, 1)),
    "d_38": _Layout("d", False, (1, 1, 3, 4, 6, 3, 1, 1)),
    "d_54": _Layout("d", True, (1, 1, 3, 4, 6, 3, 1, 1)),
    "d_105": _Layout("d", True, (1, 1, 3, 4, 23, 3, 1, 1)),
}


@final
class Network(nn.Module):
    """A DRN: (B, 3, H, W) standardised RGB, multiples of 8 -> its levels, the last one at stride 8.

    State-dict keys are those of the published classifiers: ``conv1``, ``layer3.0.bn2``, ``fc`` ...

    Args:
        arch: which one.
        channels: of the input.
        classes: of the classifier ``fc``, see :meth:`classify`; null for none.

    Attributes:
        levels: channels and stride of each map that :meth:`forward` returns, fine to coarse.
    """

    def __init__(self, arch: Arch, channels: int = 3, classes: int | None = None) -> None:
        super().__init__()
        family, bottleneck, blocks = _LAYOUTS[arch]
        if family == "a":
            self._family_a(channels, blocks)
            widths, strides = (64, 256, 512, 1024, 2048), (2, 4, 8, 8, 8)
            self._ends = ("relu", "layer1", "layer2", "layer3", "layer4")
        else:
            self._family_c_or_d(channels, blocks, family, bottleneck=bottleneck)
            widths, strides = ((16, 32, 256, 512, 512) if bottleneck else (16, 32, 64, 128, 512)), (1, 2, 4, 8, 8)
            self._ends = ("layer1", "layer2", "layer3", "layer4", "layer8")
        self.levels = tuple(Feature(c, s) for c, s in zip(widths, strides, strict=True))
        if classes is not None:
            self.fc = nn.Linear(widths[-1], classes) if family == "a" else nn.Conv2d(widths[-1], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, 2 / (k k out)), as published
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, channels, H, W) -> one map a level, see ``levels``."""
        found = []
        for name, child in self.named_children():
            if name == "fc":
                break
            x = child(x)
            if name in self._ends:
                found.append(x)
        return found

    def classify(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes) scores of the published classifier."""
        y = self(x)[-1].mean((2, 3), keepdim=True)
        scores: Tensor = self.fc(y.flatten(1) if isinstance(self.fc, nn.Linear) else y)
        return scores.flatten(1)

    def _family_a(self, channels: int, blocks: Sequence[int]) -> None:
        self._stem(channels, 64, 2)
        self.add_module("maxpool", nn.MaxPool2d(3, 2, 1))
        c_in = 64
        for number, count in enumerate(blocks, 1):
            width, stride, dilation = 32 * 2**number, (1, 2, 1, 1)[number - 1], (1, 1, 2, 4)[number - 1]
            # the first block of a layer is not dilated, as published; torchvision's and timm's is
            layer = _blocks(c_in, width, count, stride, dilation, bottleneck=True, first=1)
            self.add_module(f"layer{number}", layer)
            c_in = 4 * width

    def _family_c_or_d(self, channels: int, blocks: Sequence[int], family: str, *, bottleneck: bool) -> None:
        if family == "c":
            self._stem(channels, 16, 1)
        else:
            self.add_module("layer0", nn.Sequential(_conv(channels, 16, 7), nn.BatchNorm2d(16), nn.ReLU(inplace=True)))
        c_in = 16
        for number, (count, width, stride, dilation) in enumerate(
            zip(blocks, _WIDTHS, _STRIDES, _DILATIONS, strict=True), 1
        ):
            if 3 <= number <= 6:
                layer = _blocks(c_in, width, count, stride, dilation, bottleneck=bottleneck)
                c_in = 4 * width if bottleneck else width
            else:  # in place of max-pooling, and at the end against gridding
                if family == "c":
                    layer = _blocks(c_in, width, count, stride, dilation, bottleneck=False, residual=number < 3)
                else:
                    layer = _plain(c_in, width, count, stride, dilation)
                c_in = width
            self.add_module(f"layer{number}", layer)

    def stem(self) -> nn.Conv2d:
        """The first convolution."""
        return next(module for module in self.modules() if isinstance(module, nn.Conv2d))

    def named_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """{key of a published file: key of this network} for the keys that could be its own.

        Files hold a classifier, a segmentation network (``base.N``: its children are numbered), or one saved from
        several GPUs (``module.``); heads (``fc``, ``seg``, ``up``) are none of its keys.
        """
        keys = list(keys)
        prefix = "module." if keys and all(key.startswith("module.") for key in keys) else ""
        names = [name for name, _ in self.named_children()]  # of those without weights too: they are numbered
        numbered = any(key.startswith(f"{prefix}base.") for key in keys)
        found = {}
        for key in keys:
            first, _, rest = key.removeprefix(prefix).partition(".")
            if numbered:
                number, _, rest = rest.partition(".")
                if first != "base" or not number.isdecimal() or int(number) >= len(names):
                    continue
                first = names[int(number)]
            if first in names:
                found[key] = f"{first}.{rest}"
        return found

    def _stem(self, channels: int, width: int, stride: int) -> None:
        self.add_module("conv1", _conv(channels, width, 7, stride))
        self.add_module("bn1", nn.BatchNorm2d(width))
        self.add_module("relu", nn.ReLU(inplace=True))


@final
class _Block(nn.Module):
    """A residual block of two 3x3 convolutions, or of 1x1, 3x3 and 1x1 (bottleneck)."""

    def __init__(
        self, c_in: int, width: int, stride: int, dilation: int, *, bottleneck: bool, residual: bool = True
    ) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        sizes = (
            ((c_in, width, 1, 1, 1), (width, width, 3, stride, dilation), (width, out, 1, 1, 1))
            if bottleneck
            else ((c_in, width, 3, stride, dilation), (width, width, 3, 1, dilation))
        )
        self._count, self.residual = len(sizes), residual
        for number, (a, b, kernel, s, d) in enumerate(sizes, 1):
            self.add_module(f"conv{number}", _conv(a, b, kernel, s, d))
            self.add_module(f"bn{number}", nn.BatchNorm2d(b))
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != out:
            conv = _conv(c_in, out, 1, stride)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out)) if residual else _Unused(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, h, w) -> (B, out, h / stride, w / stride)."""
        y = x
        for number in range(1, self._count + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self._count:
                y = torch.relu(y)
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(x))
        return torch.relu(y)


@final
class _Unused(nn.Module):
    """A shortcut that the published C-58 has in blocks without one: kept so that its weights load, never run.

    Frozen, and no batch norm for those who look for some.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(len(weight))
        for name, state in (("0", {"weight": weight}), ("1", norm.state_dict())):
            part = nn.Module()
            for key, value in state.items():
                if key in ("weight", "bias"):
                    part.register_parameter(key, nn.Parameter(value.detach(), requires_grad=False))
                else:
                    part.register_buffer(key, value)
            self.add_module(name, part)


def _blocks(
    c_in: int,
    width: int,
    count: int,
    stride: int,
    dilation: int,
    *,
    bottleneck: bool,
    residual: bool = True,
    first: int | None = None,
) -> nn.Sequential:
    """A layer of blocks; the first one strides, and has a dilation of its own where ``first`` says one."""
    out = 4 * width if bottleneck else width
    return nn.Sequential(
        *(
            _Block(
                out if number else c_in,
                width,
                1 if number else stride,
                dilation if number or first is None else first,
                bottleneck=bottleneck,
                residual=residual,
            )
            for number in range(count)
        )
    )


def _plain(c_in: int, width: int, count: int, stride: int, dilation: int) -> nn.Sequential:
    """Convolutions without shortcut, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for number in range(count):
        conv = _conv(width if number else c_in, width, 3, 1 if number else stride, dilation)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _conv(c_in: int, out: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Same size, no bias."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(c_in, out, kernel, stride, padding, dilation, bias=False)
