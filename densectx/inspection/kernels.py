"""The one kernel that a stack of convolutions without non-linearities equals, and what such kernels look like.

Kernels are correlated as in :func:`torch.nn.functional.conv2d`, and given in the order in which they are applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from densectx.errors import ConfigError

Dilation: TypeAlias = int | tuple[int, int]


def compose_kernels(kernels: Sequence[Tensor], dilations: Sequence[Dilation]) -> Tensor:
    """The kernel of one convolution that equals a stack of linear ones: K_L *_dL ( ... (K_0 *_d0 x)).

    It is the Kronecker product K_L (x) ... (x) K_0 where :func:`is_kronecker` says so, with products of channel
    matrices in place of those of numbers: K[t_L ... t_0] = K_L[t_L] ... K_0[t_0]. Else, as for the dilations 1, 2, 4
    of 3x3 kernels, paths overlap, and it is read off the response to an impulse. The equality holds where no border
    comes in between: for valid or circular convolutions, or with the borders of all layers padded once in front.

    Args:
        kernels: each (kh, kw), or each (out, in, kh, kw) with the channels of one feeding the next; of one
            floating-point dtype, in which the sums are taken. The first is applied first.
        dilations: of each, an int or (vertical, horizontal).

    Returns:
        (KH, KW) or (out of the last, in of the first, KH, KW), with KH = 1 + sum of (kh - 1) * dilation.

    Raises:
        ConfigError: no kernels, another number of dilations, dilations below 1, shapes that do not fit together.
    """
    plain = bool(kernels) and kernels[0].ndim == 2
    layers = _check(kernels, dilations)
    stack = [kernel[None, None] if plain else kernel for kernel in kernels]
    composed = _kronecker(stack) if is_kronecker(kernels, dilations) else _impulse_response(stack, layers)
    return composed[0, 0] if plain else composed


def is_kronecker(kernels: Sequence[Tensor], dilations: Sequence[Dilation]) -> bool:
    """Whether the equivalent kernel is a Kronecker product: on each axis every dilation is the field of those before.

    For a x a kernels that is dilation a^l at layer l, for a_h x a_w ones (a_h^l, a_w^l). Then each tap of the
    composed kernel is hit by exactly one path. Along an axis with one tap the dilation plays no part.

    Args:
        kernels: as in :func:`compose_kernels`; only their spatial sizes matter.
        dilations: as in :func:`compose_kernels`.

    Raises:
        ConfigError: as :func:`compose_kernels`.
    """
    field = [1, 1]
    for kernel, steps in zip(kernels, _check(kernels, dilations), strict=True):
        for axis, (size, step) in enumerate(zip(kernel.shape[-2:], steps, strict=True)):
            if size > 1 and step != field[axis]:
                return False
            field[axis] *= size
    return True


def _check(kernels: Sequence[Tensor], dilations: Sequence[Dilation]) -> list[tuple[int, int]]:
    """(vertical, horizontal) dilation of each layer, of kernels that fit together."""
    steps = [(d, d) if isinstance(d, int) else d for d in dilations]
    if not kernels or len(kernels) != len(steps):
        raise ConfigError(f"{len(kernels)} kernels and {len(steps)} dilations: expected one dilation for each kernel.")
    if any(len(step) != 2 or min(step) < 1 for step in steps):
        raise ConfigError(f"dilations {list(dilations)}: expected positive integers or pairs of them.")
    shapes = [tuple(kernel.shape) for kernel in kernels]
    if len({len(shape) for shape in shapes}) != 1 or len(shapes[0]) not in (2, 4) or not all(map(all, shapes)):
        raise ConfigError(f"kernels of shapes {shapes}: expected all (kh, kw) or all (out, in, kh, kw), none empty.")
    for number, (below, above) in enumerate(pairwise(shapes), 1):
        if len(below) == 4 and below[0] != above[1]:
            raise ConfigError(
                f"kernel {number} of shape {above} takes {above[1]} channels, the one before gives {below[0]}."
            )
    return steps


def _kronecker(stack: Sequence[Tensor]) -> Tensor:
    composed = stack[0]
    for kernel in stack[1:]:
        (out, _, kh, kw), (_, first, height, width) = kernel.shape, composed.shape
        product = torch.einsum("ochw,crHW->orhHwW", kernel, composed)  # the later layer takes the larger steps
        composed = product.reshape(out, first, kh * height, kw * width)
    return composed


def _impulse_response(stack: Sequence[Tensor], dilations: Sequence[tuple[int, int]]) -> Tensor:
    first = stack[0].shape[1]
    response = torch.eye(first, dtype=stack[0].dtype, device=stack[0].device)[..., None, None]  # an impulse a channel
    for kernel, steps in zip(stack, dilations, strict=True):
        padding = [(size - 1) * step for size, step in zip(kernel.shape[2:], steps, strict=True)]
        response = F.conv2d(response, kernel, padding=padding, dilation=steps)
    return response.transpose(0, 1).flip(2, 3)  # y(p) = K[-p] for an impulse at 0


class Gallery(NamedTuple):
    """Kernels of one size from few numbers, with unit Frobenius norm.

    Attributes:
        composed: (count, 3^layers, 3^layers) from 3x3 kernels with dilations 1, 3, 9 ...: 9 * layers numbers each.
        rank_one: (count, 3^layers, 3^layers) outer products of two vectors: 2 * 3^layers numbers each.
    """

    composed: Tensor
    rank_one: Tensor

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Free numbers of a composed kernel, of one of rank one, and of any kernel of this size: 27, 54, 729."""
        side = self.composed.shape[-1]
        layers = next(n for n in range(side) if 3**n == side)
        return 9 * layers, 2 * side, side**2


def gallery(seed: int, count: int = 6, layers: int = 3) -> Gallery:
    """Random kernels composed of 3x3 ones beside random separable ones.

    Composed kernels have full rank (the rank of a Kronecker product is the product of the ranks) from fewer numbers
    than separable ones take, whose rank is 1.

    Args:
        seed: of the normal numbers.
        count: kernels of each kind.
        layers: 3x3 kernels in each composed one; 3 give 27x27.

    Returns:
        Kernels in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, layers, 3, 3, generator=generator, dtype=torch.float64)
    vectors = torch.randn(2, count, 3**layers, generator=generator, dtype=torch.float64)
    dilations = [3**layer for layer in range(layers)]
    composed = torch.stack([compose_kernels(kernels.unbind(), dilations) for kernels in small])
    rank_one = vectors[0, :, :, None] * vectors[1, :, None, :]
    return Gallery(*(kind / torch.linalg.matrix_norm(kind, keepdim=True) for kind in (composed, rank_one)))


def spectra(kernels: Tensor) -> Tensor:
    """Singular values of kernels (..., kh, kw), largest first, relative to the largest."""
    values: Tensor = torch.linalg.svdvals(kernels)
    return values / values[..., :1]


def ranks(kernels: Tensor, tolerance: float = 1e-10) -> Tensor:
    """How many relative singular values of kernels (..., kh, kw) exceed a tolerance; int64."""
    return (spectra(kernels) > tolerance).sum(-1)
