"""Padding and resampling by exact integer factors."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column so that H and W become multiples: (B, C, H, W) -> (B, C, H', W').

    Valid at every size >= 1; returns the very tensor if nothing has to be added.
    """
    bottom, right = (missing(size, multiple) for size in x.shape[-2:])
    if multiple > 1 and for_all_sizes(x):
        for dim, more in ((-2, bottom), (-1, right)):
            index = torch.arange(x.shape[dim] + more, device=x.device).clamp_max(x.shape[dim] - 1)
            x = x.index_select(dim, index)
        return x
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def for_all_sizes(x: Tensor) -> bool:
    """Whether a graph is being exported that must not branch on the size of x, (..., H, W)."""
    return torch.compiler.is_exporting() and any(isinstance(size, torch.SymInt) for size in x.shape[-2:])


def missing(size: int, multiple: int) -> int:
    """What makes a size a multiple: ``-size % multiple``, in a form that keeps a symbolic size a visible multiple."""
    return (size + multiple - 1) // multiple * multiple - size


def upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear by an integer factor, half-pixel aligned: (B, C, h, w) -> (B, C, h * factor, w * factor).

    Rounded alike at every place of a map of any size, so that a part of it answers as the whole.
    """
    if factor == 1:
        return x
    if factor & (factor - 1):  # thirds are no floats: torch finds places in float32, off by more the larger the map
        return _bilinear_phases(_bilinear_phases(x, factor, 3), factor, 2)
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


def _bilinear_phases(x: Tensor, factor: int, axis: int) -> Tensor:
    """Enlarge along an axis by one blend of neighbours for each of the places that a cell is given."""
    cells = x.shape[axis]
    before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, cells - 1)], axis)
    after = torch.cat([x.narrow(axis, 1, cells - 1), x.narrow(axis, cells - 1, 1)], axis)
    phases = []
    for number in range(factor):
        twice = 2 * number + 1 - factor  # how far from the cell's middle, in halves of a new pixel
        phases.append(torch.lerp(x, before if twice < 0 else after, abs(twice) / (2 * factor)) if twice else x)
    return torch.stack(phases, axis + 1).flatten(axis, axis + 1)


def bicubic(x: Tensor, *, up: int = 1, down: int = 1) -> Tensor:
    """MATLAB's ``imresize(x, up / down, "bicubic")`` in float: antialiased below 1, mirrored at the borders.

    Agrees with MATLAB to 1e-12 in float64, borders included; the degradation and the baseline of the
    super-resolution literature.

    Args:
        x: (B, C, H, W) float; H and W multiples of ``down``.
        up: integer enlargement (with ``down`` 1).
        down: integer reduction (with ``up`` 1).

    Returns:
        (B, C, H * up / down, W * up / down), not clamped.
    """
    if up == down:
        return x
    if up & (up - 1):  # thirds are no floats: in float32 places are off by more the larger the picture, 1e-4 at 2000
        if torch.compiler.is_exporting():
            return _bicubic_phases(x, up)
        if x.dtype == torch.float32 and x.device.type != "mps":
            return bicubic(x.double(), up=up).float()
    margin = 4 * down  # the antialiased kernel reaches 2 * down pixels; a multiple of down keeps the phase
    size = ((x.shape[-2] + 2 * margin) * up // down, (x.shape[-1] + 2 * margin) * up // down)
    y = F.interpolate(mirror(x, margin), size=size, mode="bicubic", antialias=True, align_corners=False)
    crop = margin * up // down
    return y[..., crop : size[0] - crop, crop : size[1] - crop]


def _bicubic_phases(x: Tensor, factor: int) -> Tensor:
    """Enlarge by a small convolution for each of the places that a pixel has between its neighbours.

    What :func:`bicubic` does, for a graph that is exported: runtimes find the places in float32.
    (B, C, H, W) -> (B, C, H * factor, W * factor). The kernel is Keys' (1981) with a = -0.5.
    """
    batch, channels, height, width = x.shape
    reach = 2
    place = (torch.arange(factor, device=x.device, dtype=torch.float64) + 0.5) / factor - 0.5
    d = (place[:, None] - torch.arange(-reach, reach + 1, device=x.device)).abs()
    near, far = ((1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
    weight = torch.where(d <= 1, near, torch.where(d < reach, far, 0.0)).to(x.dtype)[:, None]  # (factor, 1, 5)
    y = mirror(x, reach).reshape(batch * channels, 1, height + 2 * reach, width + 2 * reach)
    y = F.conv2d(y, weight[..., None]).transpose(1, 2).reshape(batch * channels, 1, height * factor, width + 2 * reach)
    y = F.conv2d(y, weight[:, :, None]).permute(0, 2, 3, 1)
    return y.reshape(batch, channels, height * factor, width * factor)


def mirror(x: Tensor, margin: int) -> Tensor:
    """Mirror with the edge pixel repeated (MATLAB's ``symmetric``), at any size: (..., H, W) -> (..., H+2m, W+2m)."""
    for dim in (-2, -1):
        n = x.shape[dim]
        period = torch.full((), 2 * n, device=x.device)  # ONNX takes no symbolic number here
        index = torch.arange(-margin, n + margin, device=x.device) % period
        x = x.index_select(dim, torch.where(index < n, index, 2 * n - 1 - index))
    return x


def reflect101(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Mirror without the edge pixel (OpenCV's reflect-101), as often as it takes; negative margins cut off.

    (..., H, W) -> (..., H + top + bottom, W + left + right), any size >= 1; numpy's ``pad(mode="reflect")``.
    """
    for dim, before, after in ((-2, top, bottom), (-1, left, right)):
        n = x.shape[dim]
        if before or after:
            period = torch.full((), max(2 * (n - 1), 1), device=x.device)
            index = torch.arange(-before, n + after, device=x.device) % period
            x = x.index_select(dim, torch.where(index < n, index, 2 * (n - 1) - index))
    return x


def interp_map(x: Tensor, factor: int) -> Tensor:
    """Bilinear with cell i at pixel ``factor * i``: (B, C, h, w) -> (B, C, h * factor, w * factor).

    ``interp_map`` of Yu & Koltun's code, without the half-pixel shift of :func:`upsample`; pixels behind the last cell
    repeat it, where theirs would read beyond the map.
    """
    h, w = x.shape[-2:]
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    y = F.interpolate(padded, size=(h * factor + 1, w * factor + 1), mode="bilinear", align_corners=True)
    return y[..., : h * factor, : w * factor]


def log_interp_map(x: Tensor, factor: int) -> Tensor:
    """:func:`interp_map` of numbers given and returned as their logarithms, however small they are.

    (B, C, h, w) -> (B, C, h * factor, w * factor); at pixel ``factor * i`` cell i itself, to the last bit.
    """
    for axis in (2, 3):
        cells = x.shape[axis]
        after = torch.cat([x.narrow(axis, 1, cells - 1), x.narrow(axis, cells - 1, 1)], axis)
        shares = [step / factor for step in range(1, factor)]
        between = [torch.logaddexp(x + log(1 - share), after + log(share)) for share in shares]
        x = torch.stack([x, *between], axis + 1).flatten(axis, axis + 1)
    return x


def deconvolution(x: Tensor, factor: int) -> Tensor:
    """Fixed bilinear transposed convolution, kernel 2 f, stride f, padding f / 2: (B, C, h, w) -> (B, C, h f, w f).

    Caffe's bilinear filler: :func:`upsample` but for the outer f / 2 pixels, which fade to 0.
    """
    position = torch.arange(2 * factor, dtype=x.dtype, device=x.device)
    line = 1 - (position / factor - (2 * factor - 1 - factor % 2) / (2 * factor)).abs()
    weight = (line[:, None] * line).expand(x.shape[1], 1, -1, -1)
    return F.conv_transpose2d(x, weight, stride=factor, padding=factor // 2, groups=x.shape[1])
