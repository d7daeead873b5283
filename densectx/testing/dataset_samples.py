"""What a sample must be."""

from __future__ import annotations

import torch
from torch import Tensor

from densectx.testing.report import expect
from densectx.testing.values import shape
from densectx.types import Sample, SourceInfo


def check_sample(sample: Sample, info: SourceInfo, what: str, training: bool = True) -> None:
    """Keys, types, shapes and ranges of one sample.

    Args:
        sample: what the data set gave.
        info: what the data set says of its samples.
        what: what messages call it.
        training: whether it is a training sample, whose size ``info.size`` tells.

    Raises:
        CheckFailed: something is not as :data:`densectx.types.Sample` or ``info`` says.
    """
    expect(isinstance(sample, dict), f"{what} is a {type(sample).__name__}", "return a dict of tensors")
    extra = set(sample) - {*info.keys, "gray", "valid"}
    expect(not extra, f"{what} has {sorted(extra)}", "name what it delivers in info.keys ('key' is added later)")
    for key, value in sample.items():
        expect(isinstance(value, Tensor), f"{key!r} of {what} is a {type(value).__name__}", "make it a tensor")
    expect("image" in sample, f"{what} has no 'image'", "every sample has one")
    image = sample["image"]
    ok = image.ndim == 3 and image.shape[0] == info.channels and image.dtype == torch.float32 and image.numel() > 0
    expect(ok, f"image of {what} is {shape(image)}", f"make it ({info.channels}, H, W) float32")
    low, high = image.min().item(), image.max().item()
    expect(low >= 0 and high <= 1, f"image of {what} is from {low:.4g} to {high:.4g}", "scale to sRGB 0..1")
    height, width = image.shape[-2:]
    fits = not training or info.size in (None, (height, width))
    expect(fits, f"image of {what} is {height}x{width}, info.size {info.size}", "set info.size = None if sizes differ")
    gray = sample.get("gray", torch.tensor(False))
    expect(
        gray.ndim == 0 and gray.dtype == torch.bool,
        f"gray of {what} is {shape(gray)}",
        "make it torch.tensor(True or False)",
    )
    same_channels = not bool(gray) or torch.equal(image, image[:1].expand_as(image))
    expect(same_channels, f"{what} is gray, but its channels differ", "replicate the one channel")
    if "mask" in sample:
        mask = sample["mask"]
        ok = tuple(mask.shape) == (height, width) and mask.dtype == torch.int64
        expect(ok, f"mask of {what} is {shape(mask)}", f"make it {height}x{width} int64")
        ids = set(mask.flatten().tolist()) - {info.ignore_index}
        wrong = sorted(i for i in ids if not 0 <= i < len(info.classes))
        expect(
            not wrong,
            f"mask of {what} has ids {wrong[:5]}",
            f"0..{len(info.classes) - 1}, or ignore_index {info.ignore_index}",
        )
    if "target" in sample:
        _check_target(sample["target"], info, (height * info.scale, width * info.scale), what)
    if "valid" in sample:
        valid = sample["valid"]
        ok = tuple(valid.shape) == (height, width) and valid.dtype == torch.bool
        expect(ok, f"valid of {what} is {shape(valid)}", f"make it {height}x{width} bool")


def _check_target(target: Tensor, info: SourceInfo, size: tuple[int, int], what: str) -> None:
    ok = target.ndim == 3 and tuple(target.shape[1:]) == size and target.dtype == torch.float32
    expect(
        ok,
        f"target of {what} is {shape(target)}",
        f"make it (K, {size[0]}, {size[1]}) float32, size of image x info.scale",
    )
    known = target[~target.isnan()]
    expect(not bool(known.isinf().any()), f"target of {what} is infinite somewhere", "use NaN where nothing is known")
    if info.target == "labels":
        ok = target.shape[0] == len(info.classes) and bool(((known == 0) | (known == 1)).all())
        expect(
            ok,
            f"target of {what} has {target.shape[0]} channels for {len(info.classes)} classes, or not only 0 and 1",
            "one a class, 0 or 1",
        )
    if info.target == "image":
        inside = not known.numel() or (known.min().item() >= 0 and known.max().item() <= 1)
        expect(inside, f"target of {what} leaves 0..1", "scale pictures to sRGB 0..1")
