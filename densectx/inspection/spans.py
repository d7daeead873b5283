"""What each position of a tensor sees of the input along one axis, as integer arrays that follow its shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

NONE: Final = 1 << 40
"""``lo`` of a position that sees nothing; its ``hi`` is ``-NONE``."""
PADDING: Final = -1
"""An index of :meth:`Spans.window` that lies beyond the border."""
ABSENT: Final = -2
"""An index of :meth:`Spans.window` that stands for nothing at all: a gap of a transposed convolution."""
_LARGEST: Final = 1 << 23  # elements; pairs of all positions of a map of 53 x 53
_PERIOD: Final = 64


class TooLarge(Exception):
    """Dependencies between all pairs of positions, of an attention, do not fit at this size of the input."""


@final
@dataclass(frozen=True)
class Spans:
    """First and last input index, along H or along W, that each element of a tensor depends on.

    The arrays broadcast to the tensor's shape: a dimension along which nothing changes has size 1. That holds for
    channels and for the other axis of nearly every tensor, so a map of a large network costs a line of numbers.

    Attributes:
        lo: first index, ``NONE`` where nothing is seen.
        hi: last index, ``-NONE`` where nothing is seen.
        clean: no padding, mirroring or clamping had a part in the element: it is what it would be in the middle of
            an endless input.
        causes: layers that made everything depend on the whole axis; ``lo`` and ``hi`` are what is seen beside that.
    """

    lo: Ints
    hi: Ints
    clean: Bools
    causes: tuple[str, ...] = ()

    @classmethod
    def of_input(cls, shape: Sequence[int], dim: int) -> Spans:
        """Every position sees itself."""
        index = np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        return cls(index, index, np.ones_like(index, bool))

    @classmethod
    def nothing(cls, ndim: int) -> Spans:
        """A constant."""
        one = (1,) * ndim
        return cls(np.full(one, NONE), np.full(one, -NONE), np.ones(one, bool))

    @classmethod
    def compact(cls, lo: Ints, hi: Ints, clean: Bools, causes: tuple[str, ...] = ()) -> Spans:
        """Of full arrays."""
        return cls(lo, hi, clean, causes)._each(lo, hi, clean)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the arrays."""
        return self.lo.shape

    def _each(self, lo: Ints, hi: Ints, clean: Bools) -> Spans:
        """Other arrays, with dimensions reduced to size 1 along which they do not change."""
        for dim, size in enumerate(lo.shape):
            if size > 1:
                first = (slice(None),) * dim + (slice(0, 1),)
                if all(bool((array == array[first]).all()) for array in (lo, hi, clean)):
                    lo, hi, clean = lo[first], hi[first], clean[first]
        return replace(self, lo=lo, hi=hi, clean=clean)

    def varies(self, dim: int) -> bool:
        """Whether positions along a dimension of the tensor differ."""
        return self.shape[dim] > 1

    def reduce(self, dims: Iterable[int], layer: str | None) -> Spans:
        """One element for all along dimensions, which stay with size 1.

        An axis that is reduced away altogether is global: the layer becomes a cause and nothing local is left.

        Args:
            dims: of the tensor.
            layer: where it happens; None where weights fix the size of the dimensions, so that nothing is global.
        """
        over = tuple(dim % self.lo.ndim for dim in dims)
        varied = any(self.varies(dim) for dim in over)
        if not varied:
            return self
        clean: Bools = np.asarray(self.clean.all(over, keepdims=True))
        reduced = self._each(self.lo.min(over, keepdims=True), self.hi.max(over, keepdims=True), clean)
        if layer is not None and math.prod(reduced.shape) == 1 and self.lo.max() > self.lo.min():
            return replace(Spans.nothing(self.lo.ndim), causes=_joined([self.causes, (layer,)]))
        return reduced

    def window(self, dim: int, taps: Ints, *, dirty: Bools | None = None) -> Spans:
        """Positions that each see several positions of a dimension.

        Args:
            dim: of the tensor.
            taps: (new size, K) indices of what they see, ``PADDING`` or ``ABSENT``.
            dirty: (new size,) positions that a border took part in for another reason.
        """
        constant = not self.varies(dim)
        if constant:
            # positions that see padding or gaps alone: told apart where nothing else tells places apart, which along
            # the other axis of a large map would cost a map instead of a line and change nothing
            if bool((taps >= 0).any(1).all()) or not self._alike():
                return self
            taps = np.where(taps >= 0, 0, taps)

        def taken(array: NDArray[Any], padding: Any, absent: Any) -> NDArray[Any]:
            ends = np.full_like(np.take(array, [0], dim), absent), np.full_like(np.take(array, [0], dim), padding)
            return np.take(np.concatenate([array, *ends], dim), taps, dim)  # PADDING is the last one, ABSENT before it

        clean: Bools = np.asarray(taken(self.clean, constant, True).all(dim + 1))
        if dirty is not None:
            clean &= ~dirty.reshape([-1 if d == dim else 1 for d in range(clean.ndim)])
        return self._each(taken(self.lo, NONE, NONE).min(dim + 1), taken(self.hi, -NONE, -NONE).max(dim + 1), clean)

    def _alike(self) -> bool:
        """Whether all positions that see anything see the same."""
        seeing = self.lo <= self.hi
        return bool(seeing.any()) and all(len(np.unique(array[seeing])) == 1 for array in (self.lo, self.hi))

    def moved(self, dim: int, index: Ints) -> Spans:
        """Positions of a dimension in another order, repeated or left out; where they are mirrored is not clean."""
        return self.window(dim, index[:, None], dirty=~regular(index))

    def sliced(self, dim: int, start: int, stop: int, step: int = 1) -> Spans:
        """A part of a dimension."""
        if not self.varies(dim):
            return self
        part = (slice(None),) * dim + (slice(start, stop, step),)
        return self._each(self.lo[part], self.hi[part], self.clean[part])

    def permuted(self, dims: Sequence[int]) -> Spans:
        """Dimensions in another order."""
        return self._each(self.lo.transpose(dims), self.hi.transpose(dims), self.clean.transpose(dims))

    def reshaped(self, old: Sequence[int], new: Sequence[int]) -> Spans:
        """As a tensor of shape ``old`` is read as one of shape ``new``."""
        groups = list(_groups(old, new))

        def read(array: NDArray[Any]) -> NDArray[Any]:
            full: list[int] = []
            target: list[int] = []
            for before, after in groups:
                varies = any(array.shape[d] > 1 for d in before)
                full += [old[d] if varies else 1 for d in before]
                target += [new[d] if varies else 1 for d in after]
            _check_size(full)
            return np.broadcast_to(array, full).reshape(target)

        return self._each(read(self.lo), read(self.hi), read(self.clean))

    def grouped(self, dim: int, size: int, groups: int, out: int) -> Spans:
        """Each of ``groups`` equal parts of a dimension of ``size`` as one, each seen by ``out / groups`` positions."""
        if not self.varies(dim):
            return self
        if groups == 1:
            return self.reduce([dim], None)
        parts = np.arange(size).reshape(groups, -1)
        return self.window(dim, np.repeat(parts, out // groups, 0))

    def unsqueezed(self, dim: int) -> Spans:
        """With a new dimension."""
        return replace(
            self,
            lo=np.expand_dims(self.lo, dim),
            hi=np.expand_dims(self.hi, dim),
            clean=np.expand_dims(self.clean, dim),
        )

    def dropped(self, dims: Iterable[int]) -> Spans:
        """Without dimensions along which nothing varies."""
        gone = tuple(dim % self.lo.ndim for dim in dims)
        return replace(self, lo=self.lo.squeeze(gone), hi=self.hi.squeeze(gone), clean=self.clean.squeeze(gone))

    def ordered(self, dim: int) -> Spans:
        """With what does not go on evenly along a dimension marked as not clean: seams of tensors put together."""
        if not self.varies(dim):
            return self
        others = tuple(d for d in range(self.lo.ndim) if d != dim)
        even = regular(self.lo.min(others)) & regular(self.hi.max(others))
        return self._each(
            self.lo, self.hi, self.clean & even.reshape([-1 if d == dim else 1 for d in range(self.lo.ndim)])
        )


def union(parts: Sequence[Spans]) -> Spans:
    """What elements see that are computed from several tensors, which broadcast."""
    if len(parts) == 1:
        return parts[0]
    _check_size(np.broadcast_shapes(*(part.shape for part in parts)))
    lo, hi, clean = parts[0].lo, parts[0].hi, parts[0].clean
    for part in parts[1:]:
        lo, hi, clean = np.minimum(lo, part.lo), np.maximum(hi, part.hi), clean & part.clean
    return Spans.compact(lo, hi, clean, _joined([part.causes for part in parts]))


def concatenated(parts: Sequence[Spans], sizes: Sequence[int], dim: int, *, spatial: bool) -> Spans:
    """Tensors of these sizes along a dimension, one behind the other.

    Args:
        parts: of the tensors.
        sizes: of the tensors along ``dim``.
        dim: of the tensors.
        spatial: whether positions along ``dim`` are places, so that a seam is a border.
    """
    shape = list(np.broadcast_shapes(*([1 if d == dim else s for d, s in enumerate(part.shape)] for part in parts)))

    def joined(name: str) -> NDArray[Any]:
        full = [[size if d == dim else s for d, s in enumerate(shape)] for size in sizes]
        return np.concatenate(
            [np.broadcast_to(getattr(part, name), one) for part, one in zip(parts, full, strict=True)], dim
        )

    _check_size([sum(sizes) if d == dim else s for d, s in enumerate(shape)])
    whole = Spans.compact(joined("lo"), joined("hi"), joined("clean"), _joined([part.causes for part in parts]))
    return whole.ordered(dim) if spatial else whole


def regular(index: Ints) -> Bools:
    """The longest run of a sequence that goes on evenly: each number is a constant above that one period before.

    True for all of 0 1 2 3 and 0 0 1 1 2 2, for the middle of 2 1 0 1 2 3 2 1.
    """
    best = np.zeros(len(index), bool)
    if len(index) < 2:
        return ~best
    for period in range(1, max(min(_PERIOD, len(index) // 3), 1) + 1):
        steps = index[period:] - index[:-period]
        starts = np.append(0, np.flatnonzero(np.diff(steps)) + 1)
        lengths = np.diff(np.append(starts, len(steps))) + period
        lengths[(steps[starts] == 0) | ((period > 1) & (lengths < 3 * period))] = 0
        at = int(lengths.argmax())
        if lengths[at] > best.sum():
            best = np.zeros(len(index), bool)
            best[starts[at] : starts[at] + lengths[at]] = True
        if best.all():
            break
    return best


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Runs of dimensions of two shapes that hold the same elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [i] if i < len(old) else [], [j] if j < len(new) else []
        left, right = (old[i] if before else 1), (new[j] if after else 1)
        i, j = i + len(before), j + len(after)
        while left != right:
            if left < right:
                before.append(i)
                left, i = left * old[i], i + 1
            else:
                after.append(j)
                right, j = right * new[j], j + 1
        yield before, after


def _check_size(shape: Sequence[int]) -> None:
    if math.prod(shape) > _LARGEST:
        raise TooLarge(f"dependencies of shape {tuple(shape)}")


def _joined(causes: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(cause for some in causes for cause in some))
