"""``densectx convert drn``: the published dilated residual networks, github fyu/drn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from densectx.backbones.drn import DRN, IMAGENET_MEAN, IMAGENET_STD
from densectx.backbones.drn_network import ARCHS
from densectx.errors import CheckpointError, ConfigError
from densectx.published.from_caffe import check_bilinear
from densectx.published.plan import Net, Plan, match
from densectx.published.tensors import Lazy, open_weights

TRUNK = "backbone.net."


@contextmanager
def plan(path: Path, name: str | None) -> Iterator[Plan]:
    """How to fill a network, for a ``with`` block in which the file stays open.

    A segmentation file (``base.N``, ``seg``, ``up``) fills all of it. A classifier (``conv1`` or ``layer0`` to ``fc``)
    fills the backbone, the 1x1 convolution behind it is fresh, and pixels are standardised by ImageNet's statistics.

    Args:
        path: a ``.pth`` file.
        name: of the net; None for the one whose names and shapes the file has.

    Raises:
        ConfigError: unknown net, or one that is no DRN.
        CheckpointError: damaged file, or one that does not fit.
    """
    with open_weights(path) as given:
        if name is not None:
            yield _planned(path, name, given)
            return
        names = [f"drn_{arch}" for arch in ARCHS]
        for one in names:
            try:
                planned = _planned(path, one, given, "densectx")
            except CheckpointError:
                continue
            note = f"no --net given: its names and shapes are those of {one}."
            yield Plan(planned.net, planned.taken, planned.names, planned.fresh, planned.left, [*planned.notes, note])
            return
        raise CheckpointError(f"{path}: fits none of {', '.join(names)}; give --net to hear what differs.")


def _planned(path: Path, name: str, given: Mapping[str, Lazy], distribution: str = "") -> Plan:
    prefix = "module." if given and all(key.startswith("module.") for key in given) else ""
    segmentation = any(key.startswith(f"{prefix}base.") for key in given)
    statistics = {} if segmentation else {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    net = Net.of(name, distribution)
    backbone = net.model.backbone
    if not isinstance(backbone, DRN):
        raise ConfigError(f"--net {name}: its backbone is no DRN; take one of {', '.join(f'drn_{a}' for a in ARCHS)}.")
    if statistics:
        net = Net.of(name, distribution, **statistics)
    children = [child for child, _ in backbone.net.named_children()]

    def called(own: str) -> str:
        """What the file calls a tensor of the network."""
        first, _, rest = own.partition(".")
        return f"{prefix}base.{children.index(first)}.{rest}" if segmentation else prefix + own

    wanted = {key: called(key.removeprefix(TRUNK)) for key in net.state if key.startswith(TRUNK)}
    unknown = sorted(set(backbone.net.named_keys(given)) - set(wanted.values()))
    if unknown:
        raise CheckpointError(
            f"{path}: is of another network than {name}: it also has {len(unknown)} tensors such as {unknown[0]}."
        )
    uncounted = Lazy((), lambda: torch.zeros((), dtype=torch.int64))
    given = {n: uncounted for n in wanted.values() if n.endswith(".num_batches_tracked")} | dict(given)
    if segmentation:
        projection = [key for key in net.state if key.startswith("projection.")]
        wanted |= {key: f"{prefix}seg.{key.rpartition('.')[2]}" for key in projection}
    for part in ("mean", "std"):
        wanted[f"backbone.standardize.{part}"] = part
        given[part] = _constant(net.config["backbone"].get(part) or (IMAGENET_MEAN if part == "mean" else IMAGENET_STD))
    optional = [] if segmentation else [key for key in net.state if not key.startswith("backbone.")]
    taken, fresh = match(path, net, wanted, given, optional=optional)
    used = set(wanted.values())
    left, notes = [key for key in given if key not in used], []
    if f"{prefix}up.weight" in left:
        check_bilinear(path, "up.weight", given[f"{prefix}up.weight"])
        left.remove(f"{prefix}up.weight")
        notes.append("up is the fixed bilinear deconvolution, which the net has without weights.")
    if not segmentation:
        notes.append("it is a classifier: pixels are standardised by ImageNet's statistics.")
    names = [child for child, part in backbone.net.named_children() if list(part.parameters())]
    return Plan(net, {**taken, **net.fresh(fresh)}, [*names, "seg"] if segmentation else names, fresh, left, notes)


def _constant(values: Sequence[float]) -> Lazy:
    return Lazy((1, len(values), 1, 1), lambda: torch.tensor(tuple(values)).view(1, -1, 1, 1))
