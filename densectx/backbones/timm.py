"""Any timm network that can be dilated; the dilated ResNets are presets of it."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from timm.models import load_state_dict
from torch import Tensor, nn

from densectx.backbones.base import Backbone, Standardize, add_maps, check_channels, stem_statistics
from densectx.errors import CheckpointError, ConfigError, suggest
from densectx.types import Feature


@final
class Timm(Backbone):
    """A timm feature network with its late strides turned into dilation.

    (B, in_channels, H, W), multiples of ``output_stride`` -> one map a stage, the last ones at ``output_stride``.
    Inputs are standardised as the network's own configuration says.

    Args:
        model: timm's name of the network, e.g. ``"resnet34"``.
        output_stride: 8, 16 or 32: stride of the last level.
        pretrained: take timm's weights (downloaded or from its cache, now, never on import).
        weights: local file with weights in timm's format instead (safetensors or torch).
        in_channels: other than 3, the stem's pretrained weights are adapted by timm, see
            :func:`densectx.backbones.base.stem_statistics`.
        maps: how many of the last input channels are maps (a noise level) and no image: not standardised, their weights
            start at zero.
        levels: how many stages of the pyramid to keep, null for all.
        drop_path: stochastic depth (Huang et al. 2016) in training: probability of leaving out the last residual
            branch, rising linearly from 0 at the first.

    Raises:
        ConfigError: no such network, one that cannot be dilated (vgg, densenet, swin, vit ...), ``drop_path`` for one
            that has no residual branches to leave out, or ``maps`` for one that normalises the weights of its stem.
        CheckpointError: the weights cannot be loaded, or are not those of all levels.
    """

    def __init__(
        self,
        model: str,
        output_stride: Literal[8, 16, 32] = 8,
        pretrained: bool = False,
        weights: str | None = None,
        in_channels: int = 3,
        maps: int = 0,
        levels: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not timm.is_model(model):
            raise ConfigError(f"timm has no network {model!r}{suggest(model, timm.list_models())}")
        if levels is not None and levels < 1:
            raise ConfigError(f"timm network {model!r}: levels {levels} must be positive.")
        image = check_channels(f"timm network {model!r}", in_channels, maps)
        if not 0 <= drop_path < 1:
            raise ConfigError(f"timm network {model!r}: drop_path {drop_path} is not in [0, 1).")
        self.in_channels = in_channels
        options: dict[str, Any] = {"features_only": True, "output_stride": output_stride, "in_chans": image}
        if levels is not None:
            options["out_indices"] = tuple(range(levels))
        self.features = probe(model, options)
        if drop_path:
            options["drop_path_rate"] = drop_path
            require_drop_path(model, options)
        if weights and not Path(weights).is_file():
            raise CheckpointError(f"timm network {model!r}: weights {weights!r}: no such file.")
        if pretrained or weights:
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": weights} if weights else None}
        try:
            self.net: nn.Module = timm.create_model(model, **options)
        except Exception as error:  # download, file and key errors of several libraries
            raise CheckpointError(f"timm network {model!r}: weights {weights or 'of timm'} failed: {error}.") from error
        stem = next(m for m in self.net.modules() if isinstance(m, nn.Conv2d))
        if weights:
            check_loaded(f"timm network {model!r}", self.net, weights, adapted=stem.weight if image != 3 else None)
        config = timm.get_pretrained_cfg(model)
        mean, std = (config.mean, config.std) if config is not None else ((0.5,) * 3, (0.25,) * 3)
        if maps and type(stem) not in (nn.Conv2d, Conv2dSame):
            raise ConfigError(
                f"timm network {model!r}: its first convolution, a {type(stem).__name__}, normalises its weights over"
                " all channels, so that those of maps would change the others; leave out maps."
            )
        add_maps(f"timm network {model!r}", stem, image, maps)
        self.standardize = Standardize(
            stem_statistics(mean, image, (0.0,) * maps), stem_statistics(std, image, (1.0,) * maps)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> one map a level, see ``features``."""
        return list(self.net(self.standardize(x)))


def check_loaded(what: str, net: nn.Module, path: str, adapted: Tensor | None = None) -> None:
    """See that a network holds the weights of a file: timm leaves at random what it does not find there.

    They are known by their content, since timm may rename and reshape them.

    Args:
        what: the network, for the message.
        net: the network, on the CPU.
        path: the file.
        adapted: a weight that is made of the file's.

    Raises:
        CheckpointError: some of its tensors are nowhere in the file.
    """
    there = {_digest(value) for value in load_state_dict(path).values() if isinstance(value, Tensor)}
    own = {key: value for key, value in net.state_dict(keep_vars=True).items() if value.is_floating_point()}
    missing = [key for key, value in own.items() if value is not adapted and _digest(value) not in there]
    if missing:
        raise CheckpointError(
            f"{what}: weights {path!r} have nothing for {len(missing)} of its {len(own)} tensors"
            f" ({', '.join(missing[:4])}); expected this network's weights under timm's names."
        )


def _digest(value: Tensor) -> bytes:
    return hashlib.blake2b(value.detach().float().contiguous().numpy().tobytes(), digest_size=16).digest()


def probe(model: str, options: dict[str, Any]) -> tuple[Feature, ...]:
    """The levels of a timm network, found on the meta device: nothing is allocated or read.

    Raises:
        ConfigError: the network cannot be made with this stride, or does not deliver (B, C, H, W) maps.
    """
    stride = options["output_stride"]
    height, width = 64, 64 + stride  # a size that windows of attention do not divide
    refusal = f"timm network {model!r} cannot be dilated to stride {stride}"
    hint = "Take a ResNet, RegNet, EfficientNet, MobileNet or ConvNeXt of timm, or dilated_vgg16."
    try:
        with torch.device("meta"):
            net = timm.create_model(model, **options).eval()
            maps = net(torch.zeros(1, options["in_chans"], height, width))
    except IndexError as error:
        raise ConfigError(f"timm network {model!r} has fewer than {len(options['out_indices'])} levels.") from error
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{refusal}: it does not support the option ({reason}). {hint}") from error
    levels: Any = net.feature_info
    channels, reductions = levels.channels(), levels.reduction()
    expected = [(1, c, height // r, width // r) for c, r in zip(channels, reductions, strict=True)]
    if [tuple(m.shape) for m in maps] != expected or max(reductions) > stride:
        got = ", ".join("x".join(map(str, m.shape[1:])) for m in maps)
        raise ConfigError(f"{refusal}: for a {height}x{width} image its levels are {got}. {hint}")
    return tuple(Feature(c, r) for c, r in zip(channels, reductions, strict=True))


def require_drop_path(model: str, options: dict[str, Any]) -> None:
    """Refuse ``drop_path`` for a network that would not take it, or take it and do nothing.

    Raises:
        ConfigError: no residual branch of the network is ever left out.
    """
    try:
        with torch.device("meta"):
            net = timm.create_model(model, **options)
        dropped = any(isinstance(m, DropPath) and m.drop_prob for m in net.modules())
    except TypeError:
        dropped = False
    if not dropped:
        raise ConfigError(
            f"timm network {model!r} has no residual branches that stochastic depth could leave out, or its levels hold"
            " none; leave out drop_path."
        )


dilated_resnet18 = partial(Timm, model="resnet18")
dilated_resnet34 = partial(Timm, model="resnet34")
dilated_resnet50 = partial(Timm, model="resnet50")
dilated_resnet101 = partial(Timm, model="resnet101")
