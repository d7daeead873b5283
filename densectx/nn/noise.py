"""How noisy is an image? Estimates from the image alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from densectx.nn.precision import no_autocast
from densectx.nn.resize import for_all_sizes, mirror

_DIFFERENCE = (1.0, -6.0, 15.0, -20.0, 15.0, -6.0, 1.0)  # sixth differences, in both directions
_BLOCK, _SHARE = 16, 0.1  # pixels of a block's side; which block counts, from the flattest on
_SHARE_OF_VARIANCE = 0.690  # what the block at that share has of the noise's variance, on pure noise
_SATURATED = 0.03  # share of black and white pixels that a block may have
_GROUPS = 6  # of blocks by brightness


def noise_level(image: Tensor) -> Tensor:
    """Standard deviation of white Gaussian noise: (B, C, H, W), 0..1 -> (B,) float32, same scale; mean over channels.

    Sixth differences along both axes leave the noise and little of the picture (Donoho & Johnstone 1994 and Immerkaer
    1996 use lower orders); their mean square is taken in blocks of 16x16, and the block at one tenth of the order,
    from the flattest on, decides, corrected by what it has on pure noise. Blocks with many black or white pixels do
    not count, since clipping removes noise; blocks that are black or white all over count only if there are no others.

    Measured on 20 photographs of BSDS500 and the 12 of Set12, gray, sigma 5 / 10 / 15 / 25 / 50 of 255: mean error
    +0.71 / +0.58 / +0.46 / +0.33 / -0.13 (texture reads as noise), mean absolute error 0.71 / 0.58 / 0.47 / 0.40 /
    0.50, worst 4.5 at sigma 5; with the noisy image clipped and rounded to 8 bit +0.71 / +0.58 / +0.44 / +0.19 /
    -1.66. The median of the same differences over the whole image reads +1.0 at sigma 5 and -5.6 at 50 clipped.

    An image with a side below 22 pixels is mirrored at its borders first; what is said of it is a guess.
    """
    _, variance, usable = _blocks(image)
    level = _flattest(variance, usable).clamp_min(0).sqrt()
    return level.view(image.shape[:2]).mean(1)


def signal_noise(image: Tensor) -> tuple[Tensor, Tensor]:
    """Noise of variance gain * x + sigma^2 at signal x: (B, C, H, W), 0..1 -> gain (B,), sigma (B,), float32.

    As :func:`noise_level`, for six groups of blocks from dark to bright; the line through the six variances by least
    squares, neither number negative (Foi et al. 2008 fit the same line). The mean over channels.
    """
    mean, variance, usable = _blocks(image)
    order = mean.masked_fill(~usable, torch.inf).argsort(1)  # usable blocks first, by brightness
    mean, variance = mean.gather(1, order), variance.gather(1, order)
    place = torch.arange(mean.shape[1], device=image.device)
    group = place * _GROUPS // usable.sum(1, keepdim=True).clamp_min(_GROUPS)
    signals, levels, weights = [], [], []
    for number in range(_GROUPS):
        inside = (group == number) & usable.gather(1, order)
        count = inside.sum(1)
        weights.append(count.float())
        signals.append((mean * inside).sum(1) / count.clamp_min(1))
        levels.append(_flattest(variance, inside).masked_fill(count == 0, 0.0))
    x, y, w = torch.stack(signals, 1), torch.stack(levels, 1), torch.stack(weights, 1)
    w = w / (y.square() + 1e-12)  # a variance is known to a share of itself
    w = w / w.sum(1, keepdim=True)
    x0, y0 = (w * x).sum(1, keepdim=True), (w * y).sum(1, keepdim=True)
    slope = (w * (x - x0) * (y - y0)).sum(1) / (w * (x - x0).square()).sum(1).clamp_min(1e-9)
    through_zero = (w * x * y).sum(1) / (w * x * x).sum(1).clamp_min(1e-9)
    base = y0[:, 0] - slope * x0[:, 0]
    gain = torch.where(slope < 0, 0.0, torch.where(base < 0, through_zero, slope))
    rest = torch.where(slope < 0, y0[:, 0], base.clamp_min(0))
    shape = image.shape[:2]
    return gain.view(shape).mean(1), rest.sqrt().view(shape).mean(1)


def _blocks(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance of the noise and whether it can be told, of N blocks: (B * C, N) each."""
    with no_autocast(image.device):
        reach = len(_DIFFERENCE) - 1
        x = image.float().flatten(0, 1)[:, None]
        least, margin = _BLOCK + reach, (_BLOCK + reach + 1) // 2
        if for_all_sizes(x):
            x = _mirrored_below(x, least, margin)
        elif min(x.shape[-2:]) < least:
            x = mirror(x, margin)
        kernel = x.new_tensor(_DIFFERENCE)
        kernel = kernel / kernel.square().sum().sqrt()
        detail = F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).square()
        # pooling copies it anyway; compilers of exported graphs cannot pool a view of unknown size
        inside = x[..., reach // 2 : -(reach // 2), reach // 2 : -(reach // 2)].contiguous()
        ends = ((inside <= 0) | (inside >= 1)).float()
        mean, variance, saturated = (F.avg_pool2d(y, _BLOCK, _BLOCK // 2).flatten(1) for y in (inside, detail, ends))
        # at strong noise every block has such pixels: then those that have few count, at least a quarter of the blocks
        # that have others too; blocks without others, as in a black frame, are last in the order
        quarter = (saturated < 1).sum(1, keepdim=True) // 4
        limit = saturated.sort(1).values.gather(1, quarter).clamp_min(_SATURATED)
        return mean, variance, saturated <= limit


def _flattest(variance: Tensor, usable: Tensor) -> Tensor:
    """The variance at one tenth of the usable blocks in order: (N, K) -> (N,); infinite if none is usable."""
    order = variance.masked_fill(~usable, torch.inf).sort(1).values
    place = (_SHARE * (usable.sum(1) - 1)).round().long().clamp_min(0)
    return order.gather(1, place[:, None])[:, 0] / _SHARE_OF_VARIANCE


def _mirrored_below(x: Tensor, least: int, margin: int) -> Tensor:
    """:func:`mirror` by a margin if a side is below ``least``, decided by the graph that is being exported."""
    sides = [torch.scalar_tensor(size, dtype=torch.int64, device=x.device) for size in x.shape[-2:]]
    more = torch.where(torch.minimum(*sides) < least, margin, 0)
    for dim, side in zip((-2, -1), sides, strict=True):
        size = cast("int", (side + 2 * more).item())
        torch._check(size >= least)  # the graph cannot know it, and what follows has no smaller form
        index = (torch.arange(size, device=x.device) - more) % (2 * side)
        x = x.index_select(dim, torch.where(index < side, index, 2 * side - 1 - index))
    return x
