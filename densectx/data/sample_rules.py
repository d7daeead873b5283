"""What a sample must be: for ``check_dataset``, and for ``densectx lint`` of data sets of other packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from densectx.types import Sample, SourceInfo


class Rule(NamedTuple):
    """One rule, and what to say where it is broken.

    Attributes:
        kept: whether it holds.
        found: what is so.
        advice: what to do about it.
    """

    kept: bool
    found: str
    advice: str


def fault(sample: Sample, info: SourceInfo, what: str) -> str:
    """The first of :func:`rules` that a sample breaks, as a sentence; ``""`` if it keeps them all."""
    broken = next((rule for rule in rules(sample, info, what, training=False) if not rule.kept), None)
    return f"{broken.found}; {broken.advice}." if broken else ""


def rules(sample: Sample, info: SourceInfo, what: str, *, training: bool) -> Iterator[Rule]:
    """Keys, types, shapes and ranges of one sample; whoever goes on behind a broken rule may meet any error.

    Args:
        sample: what the data set gave.
        info: what the data set says of its samples.
        what: what messages call it.
        training: whether it is a training sample, whose size ``info.size`` tells.
    """
    yield Rule(isinstance(sample, dict), f"{what} is a {type(sample).__name__}", "return a dict of tensors")
    extra = sorted(set(sample) - {*info.keys, "gray", "valid"})
    yield Rule(not extra, f"{what} has {extra}", "name what it delivers in info.keys ('key' is added later)")
    for key, value in sample.items():
        yield Rule(isinstance(value, Tensor), f"{key!r} of {what} is a {type(value).__name__}", "make it a tensor")
    yield Rule("image" in sample, f"{what} has no 'image'", "every sample has one")
    image = sample["image"]
    ok = image.ndim == 3 and image.shape[0] == info.channels and image.dtype == torch.float32 and image.numel() > 0
    yield Rule(ok, f"image of {what} is {_shape(image)}", f"make it ({info.channels}, H, W) float32")
    low, high = image.min().item(), image.max().item()
    ok = low >= 0 and high <= 1
    yield Rule(ok, f"image of {what} is from {low:.4g} to {high:.4g}", "scale to sRGB 0..1")
    height, width = size = image.shape[-2:]
    fits = not training or info.size in (None, tuple(size))
    said = f"image of {what} is {height}x{width}, info.size {info.size}"
    yield Rule(fits, said, "set info.size = None if sizes differ")
    gray = sample.get("gray", torch.tensor(False))
    ok = gray.ndim == 0 and gray.dtype == torch.bool
    yield Rule(ok, f"gray of {what} is {_shape(gray)}", "make it torch.tensor(True or False)")
    same_channels = not bool(gray) or torch.equal(image, image[:1].expand_as(image))
    yield Rule(same_channels, f"{what} is gray, but its channels differ", "replicate the one channel")
    if "mask" in sample:
        mask = sample["mask"]
        ok = mask.shape == size and mask.dtype == torch.int64
        yield Rule(ok, f"mask of {what} is {_shape(mask)}", f"make it {height}x{width} int64")
        wrong = wrong_ids(mask, info)
        rule = f"expected 0..{len(info.classes) - 1}, or {info.ignore_index} for unlabelled"
        yield Rule(not wrong, f"{what}: the mask has {wrong}, which are no classes", rule)
    if "target" in sample:
        yield from _of_target(sample["target"], info, (height * info.scale, width * info.scale), what)
    if "valid" in sample:
        valid = sample["valid"]
        ok = valid.shape == size and valid.dtype == torch.bool
        yield Rule(ok, f"valid of {what} is {_shape(valid)}", f"make it {height}x{width} bool")


def wrong_ids(mask: Tensor, info: SourceInfo) -> str:
    """The ids of a mask, of any shape, that are no classes, with their pixels; ``""`` if all are."""
    known = mask[mask != info.ignore_index]
    wrong = known[(known < 0) | (known >= len(info.classes))]
    return ", ".join(f"{number} ({count} pixels)" for number, count in sorted(Counter(wrong.tolist()).items())[:5])


def _of_target(target: Tensor, info: SourceInfo, size: tuple[int, int], what: str) -> Iterator[Rule]:
    ok = target.ndim == 3 and tuple(target.shape[1:]) == size and target.dtype == torch.float32
    advice = f"make it (K, {size[0]}, {size[1]}) float32, size of image x info.scale"
    yield Rule(ok, f"target of {what} is {_shape(target)}", advice)
    known = target[~target.isnan()]
    finite = not bool(known.isinf().any())
    yield Rule(finite, f"target of {what} is infinite somewhere", "use NaN where nothing is known")
    if info.target == "labels":
        ok = target.shape[0] == len(info.classes) and bool(((known == 0) | (known == 1)).all())
        said = f"target of {what} has {target.shape[0]} channels for {len(info.classes)} classes, or not only 0 and 1"
        yield Rule(ok, said, "one a class, 0 or 1")
    if info.target == "image":
        inside = not known.numel() or (known.min().item() >= 0 and known.max().item() <= 1)
        yield Rule(inside, f"target of {what} leaves 0..1", "scale pictures to sRGB 0..1")


def _shape(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
