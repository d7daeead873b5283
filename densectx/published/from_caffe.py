"""``densectx convert caffe``: the published networks of Yu & Koltun (2016), github fyu/dilation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from densectx.errors import CheckpointError, ConfigError
from densectx.model_names import provided
from densectx.published.caffe import open_caffemodel
from densectx.published.plan import Net, Plan, match
from densectx.published.tensors import Lazy
from densectx.registry import MODELS

FRONT_END = "backbone.layers."
"""Where the front end's convolutions are in a model; below they are called as in Caffe."""


@contextmanager
def caffe_layers(path: Path) -> Iterator[dict[str, Lazy]]:
    """The blobs of a ``.caffemodel`` as ``<layer>.weight`` and ``<layer>.bias``, for a ``with`` block.

    Raises:
        CheckpointError: damaged, see :func:`densectx.published.caffe.open_caffemodel`.
    """
    with open_caffemodel(path) as model:
        yield {
            f"{layer}.{('weight', 'bias')[index] if index < 2 else f'blob{index}'}": Lazy(
                blob.shape, partial(model.read, blob)
            )
            for layer, blobs in model.layers.items()
            for index, blob in enumerate(blobs)
        }


@contextmanager
def plan(path: Path, name: str | None) -> Iterator[Plan]:
    """How to fill a network, for a ``with`` block in which the file stays open.

    Args:
        path: a ``.caffemodel``.
        name: of the net; None for the one that the file's layers fit.

    Raises:
        ConfigError: unknown net, one without the paper's front end, or none given and not one fits.
        CheckpointError: damaged file, missing layers, other shapes, or a context with other layers.
    """
    with caffe_layers(path) as given:
        yield _guessed(path, given) if name is None else _planned(path, Net.of(name), given)


def _planned(path: Path, net: Net, given: Mapping[str, Lazy]) -> Plan:
    final = "fc-final" if "fc-final.weight" in given else "final"
    prefix = "ct_" if any(name.startswith("ct_") for name in given) else "ctx_"
    wanted = {}
    for key in net.state:
        if key.startswith(FRONT_END):
            wanted[key] = key.removeprefix(FRONT_END)
        elif key.startswith("projection."):
            wanted[key] = f"{final}.{key.rpartition('.')[2]}"
    convolutions = _context(net)
    for module, layer in zip(convolutions, context_names(prefix, len(convolutions)), strict=True):
        wanted |= {f"{module}.{part}": f"{layer}.{part}" for part in ("weight", "bias")}
    taken, _ = match(path, net, wanted, given, flat=True)
    left, notes = [name for name in given if name not in wanted.values()], []
    if "ctx_upsample.weight" in left:
        check_bilinear(path, "ctx_upsample", given["ctx_upsample.weight"])
        left.remove("ctx_upsample.weight")
        notes.append("ctx_upsample is the fixed bilinear deconvolution, which the net has without weights.")
    others = [name for name in left if name.startswith(("ct_", "ctx_"))]
    if others and convolutions:
        raise CheckpointError(
            f"{path}: is of another network than {net.name}, whose context has {len(convolutions)} layers: it also has"
            f" {', '.join(layers(others))}."
        )
    return Plan(net, taken, layers(wanted.values()), left=layers(left), notes=notes)


def _guessed(path: Path, given: Mapping[str, Lazy]) -> Plan:
    """The one network of this process and of densectx that a file fits wholly; other packages are not asked."""
    tried, found = [], []
    for entry in MODELS.entries():
        # in full: another package may provide the name too
        config = provided(f"{entry.distribution}/{entry.name}") if entry.entry_point is None else None
        backbone = config.get("backbone") if isinstance(config, Mapping) else None
        if (backbone if isinstance(backbone, str) else (backbone or {}).get("name")) != "frontend_vgg16":
            continue
        tried.append(entry.name)
        try:
            planned = _planned(path, Net.of(entry.name, entry.distribution), given)
        except CheckpointError:
            continue
        if not planned.left:
            found.append(planned)
    if len(found) != 1:
        fit = f"it fits {', '.join(plan.net.name for plan in found)}" if found else "no known net fits it"
        raise ConfigError(f"{path}: {fit}; give --net, one of {', '.join(tried)}, which also says what does not fit.")
    return Plan(
        found[0].net,
        found[0].taken,
        found[0].names,
        notes=[*found[0].notes, f"no --net given: its layers and classes are those of {found[0].net.name}."],
    )


def context_names(prefix: str, count: int) -> list[str]:
    """The published names of a context's convolutions, in order: three or more 3x3 and a 1x1.

    Args:
        prefix: ``ct_`` (PASCAL VOC) or ``ctx_``.
        count: of convolutions, at least 4, or 0 for no context.
    """
    if not count:
        return []
    middle = [f"conv{number}_1" for number in range(2, count - 2)]
    names = ["conv1_1", "conv1_2", *middle, "fc1", "final"]
    return [prefix + name for name in names]


def _context(net: Net) -> list[str]:
    """State-dict prefixes of the convolutions of a net's context, in order.

    Raises:
        ConfigError: no network of the paper.
    """
    if f"{FRONT_END}conv1_1.weight" not in net.state or list(net.model.context) != ["shared"]:
        raise ConfigError(
            f"--net {net.name}: is no network with the paper's front end (frontend_vgg16) and one context, which is"
            " what Caffe files hold."
        )
    shared = net.model.context["shared"]
    found = [f"context.shared.{name}" for name, part in shared.named_modules() if isinstance(part, nn.Conv2d)]
    if 0 < len(found) < 4:
        raise ConfigError(f"--net {net.name}: its context has {len(found)} layers, the published ones 7, 8 or 10.")
    return found


def layers(names: Iterable[str]) -> list[str]:
    """Names of tensors without ``.weight`` and ``.bias``, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def check_bilinear(path: Path, name: str, weight: Lazy) -> None:
    """Refuse a deconvolution other than Caffe's bilinear filler, which enlarges by 8 and is not learned.

    Args:
        path: of the file, for messages.
        name: of the layer.
        weight: (classes, 1, 16, 16), one kernel a class.

    Raises:
        CheckpointError: other shape or numbers.
    """
    if weight.shape[1:] != (1, 16, 16):
        shape = "x".join(map(str, weight.shape))
        raise CheckpointError(f"{path}: {name} is {shape}, not Cx1x16x16, the fixed deconvolution by 8 of C classes.")
    if not torch.allclose(weight.read(), bilinear(8).expand(weight.shape), atol=1e-5):
        raise CheckpointError(
            f"{path}: {name} is not the fixed bilinear deconvolution by 8: it was trained or damaged."
        )


def bilinear(factor: int) -> Tensor:
    """Caffe's bilinear filler for a kernel of twice an even factor: (2 factor, 2 factor)."""
    centre = (2 * factor - 1) / (2 * factor)
    line = 1 - (torch.arange(2 * factor) / factor - centre).abs()
    return line[:, None] * line
