"""The published tiled inference of Yu & Koltun's networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor

from densectx.backbones.base import MarginBackbone
from densectx.errors import ConfigError
from densectx.heads.linear import Upsample
from densectx.model import DenseModel, as_batch
from densectx.nn.precision import full, no_autocast
from densectx.nn.resize import reflect101


def default_paper(model: DenseModel, tasks: Sequence[str]) -> bool:
    """Whether published tiles are the default: for all of these tasks a published network can be taken in them."""
    return _obstacle(model, tasks) is None


def check_paper(model: DenseModel, tasks: Sequence[str]) -> None:
    """Refuse what :func:`paper_tiles` cannot do.

    Raises:
        ConfigError: the network has no published tile, or is none of the paper's.
    """
    if obstacle := _obstacle(model, tasks):
        raise ConfigError(f"--tile paper: is for {obstacle}; take --tile whole.")


def _obstacle(model: DenseModel, tasks: Sequence[str]) -> str | None:
    """What published tiles are for, where a model is not that."""
    if not isinstance(model.backbone, MarginBackbone) or model.backbone.tile is None:
        return "networks with a published input size (model.backbone.tile, as dilation8_camvid has)"
    others = [key for key in tasks if not _published(model, key)]
    if others or model.kinds or model.ablate:
        return (
            f"classes of colour images by a head 'upsample'{f', not {others[0]!r}' if others else ''}, without norms"
            " per input and ablations"
        )
    return None


def _published(model: DenseModel, key: str) -> bool:
    """Whether a task is the paper's: its input, which is not asked for, the image, and its answer of that size."""
    task = model.task(key)
    as_it_is = task.output == "classes" and task.unchanged and task.scale == 1
    return as_it_is and isinstance(task.head, Upsample) and model.channels(key) == 3


class _Part(NamedTuple):
    """One tile: its row and column in the grid, and what the network takes, margins included."""

    row: int
    column: int
    window: Tensor


@torch.no_grad()
def paper_tiles(model: DenseModel, image: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """Answer as the published code does (``predict.py`` of fyu/dilation): in tiles of the published size.

    The picture is mirrored by the margin and cut at steps of tile - 2 margin; the last tiles are filled up by mirroring
    themselves. What the context module answers is joined before ``interp_map``, and after any other upsampling. Zeros
    that pad the context come in at the border of each tile: this is no exact tiling. Where the step is no whole number
    of cells (KITTI: 158.5) tiles overlap by the rest, so that cells stay 8 pixels apart.

    Args:
        model: of :func:`check_paper`, in evaluation mode.
        image: (1 | 3, H, W) sRGB 0..1 or uint8.
        tasks: keys.

    Returns:
        {task: (K, H, W)} float32 on the image's device, see :meth:`densectx.model.DenseModel.predict`.
    """
    backbone = cast("MarginBackbone", model.backbone)
    assert backbone.tile is not None
    x = as_batch(image).to(next(model.parameters()).device).expand(-1, 3, -1, -1)
    steps = tuple((side - 2 * backbone.margin) // model.stride * model.stride for side in backbone.tile)
    rows: dict[str, list[list[Tensor]]] = {key: [] for key in tasks}
    for part in _parts(x, backbone.tile, (steps[0], steps[1]), backbone.margin):
        pyramid = backbone.valid(part.window)
        projected = model.projection(pyramid[-1])
        for key in tasks:
            scores = model.context["shared" if "shared" in model.context else key](projected)
            if not _joined_first(model, key):
                scores = model.task(key).head([scores], part.window)
            if part.column == 0:
                rows[key].append([])
            rows[key][-1].append(scores)
    answers = {}
    for key in tasks:
        unit = 1 if _joined_first(model, key) else model.stride
        output = _joined(rows[key], steps[0] // model.stride * unit, steps[1] // model.stride * unit)
        if _joined_first(model, key):
            output = model.task(key).head([output], x)
        with no_autocast(x.device):
            answer = model.task(key).postprocess(full(output[..., : x.shape[-2], : x.shape[-1]]), x)
        answers[key] = answer[0].float().to(image.device)
    return answers


def _joined_first(model: DenseModel, key: str) -> bool:
    return cast("Upsample", model.task(key).head).method == "interp_map"


def _parts(x: Tensor, tile: tuple[int, int], step: tuple[int, int], margin: int) -> Iterator[_Part]:
    padded = reflect101(x, margin, margin, margin, margin)
    counts = [-(-size // along) for size, along in zip(x.shape[-2:], step, strict=True)]
    for row, column in product(*map(range, counts)):
        top, left = row * step[0], column * step[1]
        window = padded[..., top : top + tile[0], left : left + tile[1]]
        yield _Part(row, column, reflect101(window, 0, tile[0] - window.shape[-2], 0, tile[1] - window.shape[-1]))


def _joined(rows: Sequence[Sequence[Tensor]], high: int, wide: int) -> Tensor:
    """One map of all; of each part but the last in its row and column only so many rows and columns."""
    lines = [torch.cat([*(part[..., :wide] for part in row[:-1]), row[-1]], -1) for row in rows]
    return torch.cat([*(line[..., :high, :] for line in lines[:-1]), lines[-1]], -2)
