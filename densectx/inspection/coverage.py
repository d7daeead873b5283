"""Which inputs a stack of dilated convolutions is connected to, and how evenly: counted, not guessed.

One axis is enough: the taps of a square stack are all pairs of the taps along one axis, path counts their products.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

from densectx.errors import ConfigError


class Coverage(NamedTuple):
    """What one output sees along one axis.

    Attributes:
        connected: taps that at least one path leads to.
        field: taps from the first connected one to the last, 1 + sum of (kernel - 1) * dilation.
        taps: of each of them whether it is connected.
        gridding: 0 (even) to 1 (a lattice), see :func:`gridding`.
    """

    connected: int
    field: int
    taps: tuple[bool, ...]
    gridding: float


def coverage(dilations: Sequence[int], kernel: int | Sequence[int] = 3) -> Coverage:
    """The taps that are reached when one output is followed back through every layer.

    "No holes where each dilation is at most the field below it" is right for ascending dilations only: (2, 1) leaves
    none. The order of the layers plays no part, neither here nor in :func:`path_counts` and :func:`gridding`.

    Args:
        dilations: of the layers.
        kernel: taps along this axis, of all layers or of each one.

    Raises:
        ConfigError: a dilation or kernel below 1, or numbers of layers that differ.
    """
    layers = _layers(dilations, kernel)
    reached = 1  # bit t: tap t is connected
    for size, dilation in layers:
        below = reached
        for tap in range(1, size):
            reached |= below << tap * dilation
    field = reached.bit_length()
    return Coverage(
        reached.bit_count(), field, tuple(bool(reached >> t & 1) for t in range(field)), gridding(dilations, kernel)
    )


def path_counts(dilations: Sequence[int], kernel: int | Sequence[int] = 3) -> tuple[int, ...]:
    """How many paths lead from one output to each tap of its field: the impulse response of kernels of ones, exactly.

    Args:
        dilations: of the layers.
        kernel: taps along this axis, of all layers or of each one.

    Raises:
        ConfigError: as :func:`coverage`.
    """
    counts = [1]
    for size, dilation in _layers(dilations, kernel):
        wider = [0] * (len(counts) + (size - 1) * dilation)
        for tap in range(size):
            for place, count in enumerate(counts, tap * dilation):
                wider[place] += count
        counts = wider
    return tuple(counts)


def gridding(dilations: Sequence[int], kernel: int | Sequence[int] = 3) -> float:
    """How far the paths of a stack keep to a lattice, the cause of the gridding artefacts of dilated networks.

    For each m > 1 that divides a dilation, p(r) is the share of all paths that end at a tap t = r (mod m), and
    g(m) = 1 - H(p) / log m with the entropy H. The score is the largest g(m). It is 0 where the paths do not depend on
    the position modulo any dilation, as in (1, 3, 9), and 1 where all end in one residue class, as in (2, 2, 2) or
    (4, 6). p is also how the stack weighs the m phases of a pattern of period m, so that the fall of the counts
    towards the ends of the field has no part in it. (1, 2, 4) has 0.08, as each second inner tap has fewer paths
    (3 2 3 1 3 2 3); the paper's (1, 1, 2, 4, 8, 16, 1) has 0.004, since its layers of dilation 1 even that out.

    Where the artefacts are described, and avoided by layers of small dilation behind the others or by dilations
    without a common divisor: Yu, Koltun and Funkhouser, "Dilated Residual Networks" (2017), section 4; Wang et al.,
    "Understanding Convolution for Semantic Segmentation" (2018), section 3.2. Neither defines a score: this is ours.

    Args:
        dilations: of the layers; layers with a kernel of 1 have no part in it.
        kernel: taps along this axis, of all layers or of each one.

    Raises:
        ConfigError: as :func:`coverage`.
    """
    layers = [(size, dilation) for size, dilation in _layers(dilations, kernel) if size > 1]
    periods = {m for _, dilation in layers for m in _divisors(dilation)}
    return max((_unevenness(_folded(layers, m)) for m in periods), default=0.0)


def suggest_dilations(field: int) -> tuple[int, ...]:
    """Dilations of 3x3 layers with a wished field, without holes, nearly without gridding, in the paper's style.

    The style is (1, 1, 2, 4, ..., 1): two layers of dilation 1, dilations that at most double, one layer of dilation 1
    to smooth. Of the stacks of that style with this field it has the fewest layers: powers of 2, and one dilation for
    what is left, in ascending order. 67, 35 and 259 give the paper's own. The fields 3, 5 and 7 are layers of
    dilation 1.

    Args:
        field: side of the square that one output shall see, at least 3. Stacks of 3x3 layers have odd fields, all of
            which are reached; an even one gives the next larger.

    Raises:
        ConfigError: the field is below 3.
    """
    if field < 3:
        raise ConfigError(f"no 3x3 layer has a field of {field}; the smallest is 3.")
    total = field // 2  # sum of the dilations
    if total <= 3:
        return (1,) * total
    middle = [2]
    while sum(middle) < total - 3:
        middle.append(2 * middle[-1])
    middle[-1] -= sum(middle) - (total - 3)
    return (1, 1, *sorted(middle), 1)


def _layers(dilations: Sequence[int], kernel: int | Sequence[int]) -> list[tuple[int, int]]:
    """(kernel, dilation) of each layer."""
    sizes = [kernel] * len(dilations) if isinstance(kernel, int) else list(kernel)
    if len(sizes) != len(dilations):
        raise ConfigError(f"{len(dilations)} dilations {tuple(dilations)} for {len(sizes)} kernels {tuple(sizes)}.")
    if min([*sizes, *dilations], default=1) < 1:
        raise ConfigError(f"dilations {tuple(dilations)} and kernels {tuple(sizes)} must be positive integers.")
    return list(zip(sizes, dilations, strict=True))


def _divisors(number: int) -> set[int]:
    """All divisors above 1."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return {*small, *(number // d for d in small)} - {1}


def _folded(layers: Sequence[tuple[int, int]], period: int) -> list[int]:
    """Paths that end in each residue class modulo ``period``."""
    counts = [1] + [0] * (period - 1)
    for size, dilation in layers:
        steps = [tap * dilation for tap in range(size)]
        counts = [sum(counts[(place - step) % period] for step in steps) for place in range(period)]
    return counts


def _unevenness(counts: Sequence[int]) -> float:
    """1 - entropy / log n of n counts: 0 where all are equal, 1 where all but one are 0."""
    if len(set(counts)) == 1:
        return 0.0
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return 1 + sum(share * log(share) for share in shares) / log(len(counts))
