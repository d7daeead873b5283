"""Batches as a source delivers them, made up from what is known of the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from densectx.rng import generator
from densectx.types import Sample, SourceInfo

CORNER = (6, 8)
"""Height and width of what the first sample leaves unlabelled, of larger images."""

EVERYTHING = SourceInfo(classes=("a", "b", "c"), keys=("image", "mask", "target"), target="map")


def candidates() -> list[SourceInfo]:
    """Sources that a task may want, the most common first."""
    kinds = [EVERYTHING, replace(EVERYTHING, target="labels"), replace(EVERYTHING, target="image")]
    enlarged = [replace(info, scale=scale) for scale in (2, 4) for info in (kinds[2], kinds[0])]
    plain = [SourceInfo(classes=("a", "b", "c"), keys=("image", "mask")), SourceInfo()]
    colour = [*kinds, *enlarged, *plain]
    return [*colour, *(replace(info, channels=1) for info in colour)]


def make_batch(
    info: SourceInfo, count: int = 4, size: tuple[int, int] | None = None, seed: int = 0, maps: int = 1
) -> Sample:
    """A collated batch: coarse and fine structure, a corner without labels, the last sample from a gray file.

    Args:
        info: of the source; decides about keys, channels and kinds.
        count: samples.
        size: (H, W); default the source's, else 24 x 20.
        seed: of everything.
        maps: channels of a target that is a map.
    """
    height, width = size or info.size or (24, 20)
    rng = torch.Generator().manual_seed(seed)
    batch = {"image": _picture(count, info.channels, height, width, rng)}
    gray = torch.zeros(count, dtype=torch.bool)
    gray[-1:] = count > 1
    batch["image"][gray] = batch["image"][gray].mean(1, keepdim=True)
    batch["gray"] = gray if info.channels > 1 else torch.ones_like(gray)
    if "mask" in info.keys:
        batch["mask"] = torch.randint(0, max(len(info.classes), 1), (count, height, width), generator=rng)
    if "target" in info.keys:
        batch["target"] = _target(info, count, height * info.scale, width * info.scale, rng, maps)
    batch["key"] = torch.tensor([[0, index] for index in range(count)]).view(count, 2)
    return without_corner(batch, info)


def _picture(count: int, channels: int, height: int, width: int, rng: torch.Generator) -> Tensor:
    coarse = F.interpolate(torch.rand(count, channels, 4, 4, generator=rng), (height, width), mode="bilinear")
    return (0.6 * coarse + 0.4 * torch.rand(count, channels, height, width, generator=rng)).clamp(0, 1)


def _target(info: SourceInfo, count: int, height: int, width: int, rng: torch.Generator, maps: int) -> Tensor:
    if info.target == "image":
        return _picture(count, info.channels, height, width, rng)
    if info.target == "labels":
        return torch.randint(0, 2, (count, max(len(info.classes), 1), height, width), generator=rng).float()
    # shares and fields: exact zeros, ones and all between
    return (1.6 * torch.rand(count, maps, height, width, generator=rng) - 0.3).clamp(0, 1)


def without_labels(batch: Sample, info: SourceInfo, rows: Sequence[int] | None = None) -> Sample:
    """The batch with the labels of some samples (default: all) unlabelled, as collating fills them in."""
    chosen = list(range(len(batch["image"]))) if rows is None else list(rows)
    found = {key: value.clone() for key, value in batch.items()}
    if "mask" in found:
        found["mask"][chosen] = info.ignore_index
    if "target" in found:
        found["target"][chosen] = torch.nan
    return found


def corner(batch: Sample) -> tuple[int, int]:
    """Height and width of what is unlabelled, in pixels of the image; some of each side is left."""
    height, width = batch["image"].shape[-2:]
    return min(CORNER[0], height - 1), min(CORNER[1], width - 1)


def without_corner(batch: Sample, info: SourceInfo) -> Sample:
    """The batch with the corner of its first sample unlabelled."""
    found = {key: value.clone() for key, value in batch.items()}
    top, left = corner(batch)
    if "mask" in found:
        found["mask"][0, :top, :left] = info.ignore_index
    if "target" in found:
        found["target"][0, :, : top * info.scale, : left * info.scale] = torch.nan
    return found


def resized(batch: Sample, info: SourceInfo, size: tuple[int, int]) -> Sample:
    """The batch at another size (H, W) of its images, every value the one of the nearest pixel."""
    found = dict(batch)
    for key, scale in {"image": 1, "mask": 1, "valid": 1, "target": info.scale}.items():
        if key in batch:
            rows, columns = (
                torch.arange(side * scale) * old // (side * scale)
                for side, old in zip(size, batch[key].shape[-2:], strict=True)
            )
            found[key] = batch[key][..., rows[:, None], columns]
    return found


def padded(batch: Sample, info: SourceInfo) -> Sample:
    """The batch as if the last third of the rows were padding: ``valid`` is false there, labels are unlabelled."""
    found = {key: value.clone() for key, value in batch.items()}
    height, width = batch["image"].shape[-2:]
    real = real_rows(batch)
    found["valid"] = torch.ones(len(batch["image"]), height, width, dtype=torch.bool)
    found["valid"][:, real:] = False
    if "mask" in found:
        found["mask"][:, real:] = info.ignore_index
    if "target" in found:
        found["target"][:, :, real * info.scale :] = torch.nan
    return found


def real_rows(batch: Sample) -> int:
    """Rows that :func:`padded` leaves."""
    height = batch["image"].shape[-2]
    return max(height - height // 3, 1)


def take(batch: Sample, rows: Sequence[int]) -> Sample:
    """Some samples of a batch."""
    return {key: value[list(rows)] for key, value in batch.items()}


def generators(batch: Sample, *more: int | str) -> list[torch.Generator]:
    """One fresh generator a sample, a function of its key."""
    device = batch["image"].device
    return [generator("check", *key, *more, device=device) for key in batch["key"].tolist()]
