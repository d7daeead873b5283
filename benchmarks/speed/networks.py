"""Networks that are timed: ours from configs, the peers by their libraries or, where they are small, by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from record import ROOT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from densectx.config import compose
from densectx.data.module import DataModule
from densectx.inspection.subject import MODEL_KEYS, subject_of
from densectx.model import DenseModel
from densectx.nn.resize import bicubic
from densectx.registry import BACKBONES
from densectx.types import SourceInfo

Loss = Callable[[Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True)
class Network:
    """A network with one input and one output.

    Attributes:
        name: for the tables.
        module: its weights, which do not change what it takes.
        run: (module, (B, C, H, W)) -> (B, K, H * scale, W * scale).
    """

    name: str
    module: nn.Module
    run: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)

    def facts(self, x: Tensor, training: bool = False) -> dict[str, int]:
        """Parameters, and multiply-adds of a call (and its backward) for an input like x."""
        return {"parameters": parameters(self.module), "macs": macs(self, tuple(x.shape), training)}


def parameters(*modules: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for module in modules for p in module.parameters())


def macs(network: Network, shape: Sequence[int], training: bool) -> int:
    """Multiply-adds of convolutions and matrix products, counted on the meta device."""
    shell = deepcopy(network.module).to("meta").train(training)

    def run() -> None:
        with torch.set_grad_enabled(training):
            output = network.run(shell, torch.empty(*shape, device="meta"))
        if training:
            output.sum().backward()

    return counted(run)


def counted(run: Callable[[], object]) -> int:
    """Multiply-adds of convolutions and matrix products of a call, which is done."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops() // 2)


def found(config: str) -> Path:
    """A config as it is given, else in the checkout."""
    return Path(config) if Path(config).exists() else ROOT / config


def model_config(config: str, flags: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, SourceInfo]]:
    """The ``model`` part of a YAML config that says what the network is, and its sources; reads no data."""
    values = compose([found(config)], list(flags.items())).values
    model = {key: value for key, value in values["model"].items() if key in MODEL_KEYS}
    if isinstance(model["backbone"], Mapping):  # weights do not change the time
        model["backbone"] = {k: v for k, v in model["backbone"].items() if k not in ("weights", "pretrained")}
    return model, DataModule(values["data"]["sources"], num_workers=0).info()


def build(
    model: Mapping[str, Any], sources: Mapping[str, SourceInfo], tasks: Sequence[str] | None = None
) -> DenseModel:
    """A model with fresh weights, of some of a config's tasks."""
    torch.manual_seed(0)
    kept = {key: spec for key, spec in model["tasks"].items() if tasks is None or key in tasks}
    return DenseModel.from_config({**model, "tasks": kept}, sources).to(memory_format=torch.channels_last)


def ours(config: str, flags: Mapping[str, str], name: str = "ours") -> Network:
    """The first task of a config, a checkpoint or a named model; the flags are for YAML files."""
    if Path(config).suffix in (".yaml", ".yml"):
        model = build(*model_config(config, flags))
    else:
        model = subject_of(config).real().to(memory_format=torch.channels_last)
    return Network(name, model, partial(_one_task, key=next(iter(model.tasks))))


def _one_task(module: nn.Module, x: Tensor, key: str) -> Tensor:
    outputs: dict[str, Tensor] = module({key: x})
    return outputs[key]


def task_input(network: Network, image: Tensor) -> Tensor:
    """What a network of ours is fed for an image: a noise level may come with it."""
    assert isinstance(network.module, DenseModel)
    task = network.module.task(next(iter(network.module.tasks)))
    return task.inputs(image, dict.fromkeys(task.options, 25.0)).contiguous(memory_format=torch.channels_last)


def channels(network: Network) -> int:
    """Channels of the images that a network of ours takes."""
    assert isinstance(network.module, DenseModel)
    return network.module.channels(next(iter(network.module.tasks)))


def deeplab(classes: int) -> Network:
    """DeepLabV3 of segmentation-models-pytorch on its ResNet-34, dilated to stride 8."""
    import segmentation_models_pytorch as smp

    net = smp.DeepLabV3("resnet34", encoder_weights=None, encoder_output_stride=8, classes=classes)
    return Network("smp DeepLabV3", net.to(memory_format=torch.channels_last))


@final
class Fcn(nn.Module):
    """torchvision's FCN head on our dilated ResNet-34: torchvision's own cannot be dilated."""

    def __init__(self, classes: int) -> None:
        from torchvision.models.segmentation.fcn import FCNHead

        super().__init__()
        self.backbone = BACKBONES.build("dilated_resnet34", "fcn")
        self.head = FCNHead(self.backbone.features[-1].channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes, H, W), as torchvision's segmentation models do it."""
        y = self.head(self.backbone(x)[-1])
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def fcn(classes: int) -> Network:
    """See :class:`Fcn`."""
    return Network("torchvision FCN head", Fcn(classes).to(memory_format=torch.channels_last))


def stack(layers: int, width: int, channels: int) -> nn.Sequential:
    """3x3 convolutions with biases and ReLU between: DnCNN with its norms merged, VDSR."""
    sizes = [channels, *(width,) * (layers - 1), channels]
    parts: list[nn.Module] = []
    for here, there in pairwise(sizes):
        parts += [nn.Conv2d(here, there, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts[:-1]).to(memory_format=torch.channels_last)


def dncnn(channels: int) -> Network:
    """DnCNN-S (Zhang et al. 2017) as it is deployed: 17 layers of 64, 555 K parameters when gray."""
    return Network("DnCNN-S", stack(17, 64, channels), lambda net, x: x - net(x))


def vdsr(channels: int, scale: int) -> Network:
    """VDSR (Kim et al. 2016): 20 layers of 64 on the bicubic enlargement."""

    def run(net: nn.Module, x: Tensor) -> Tensor:
        large = bicubic(x, up=scale)
        return large + net(large)

    return Network("VDSR", stack(20, 64, channels), run)


def inference(network: Network, x: Tensor, dtype: str) -> Callable[[], None]:
    """One answer. The network is left in evaluation mode."""
    network.module.eval()

    def run() -> None:
        with torch.inference_mode(), autocast(dtype):
            network.run(network.module, x)

    return run


def training(network: Network, x: Tensor, target: Tensor, loss: Loss, dtype: str) -> Callable[[], None]:
    """Forward, loss in float32, backward, AdamW. The network is left in training mode."""
    module = network.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def run() -> None:
        with autocast(dtype):
            output = network.run(module, x)
        optimizer.zero_grad()
        loss(output.float(), target).backward()
        optimizer.step()

    return run


def autocast(dtype: str) -> torch.autocast:
    """Of the CPU; fp32 is none."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")


def picture(batch: int, channels: int, size: tuple[int, int]) -> Tensor:
    """(batch, channels, *size) in 0..1, channels last."""
    x = torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)
