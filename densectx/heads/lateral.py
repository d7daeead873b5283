"""Which maps of a pyramid a head joins on its way from the context's stride to a finer one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from densectx.types import Feature


def lateral_steps(features: Sequence[Feature], least: int = 1) -> tuple[list[tuple[int, int]], int]:
    """From coarse to fine: the factor of each enlargement, and the map to be joined after it.

    Args:
        features: of the pyramid's maps, and of the context behind them.
        least: strides finer than this are not joined.

    Returns:
        (factor, index in the pyramid) of the deepest map of each stride that is finer than the context's, and the
        stride reached by them.
    """
    *pyramid, context = features
    deepest = {f.stride: i for i, f in enumerate(pyramid) if least <= f.stride < context.stride}
    strides = [context.stride, *sorted(deepest, reverse=True)]
    return [(coarse // fine, deepest[fine]) for coarse, fine in pairwise(strides)], strides[-1]
