"""Several data sets as one source."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, final

from pytorch_lightning.utilities import rank_zero_info

from densectx.data.base import Dataset, FromFiles, Located, MissingSplitError, Split
from densectx.errors import ConfigError, DataError
from densectx.registry import DATASETS
from densectx.types import Sample

_ALIKE = ("channels", "classes", "ignore_index", "target", "scale")


@final
class Concat(Dataset):
    """The samples of several data sets, one after the other, each image once.

    Images of different parts are told apart by the stem of their file alone, whatever they show, since copies of an
    image may differ in format and size; those of one part by their path. An image that several parts have is taken from
    the first that has it; training leaves out every image that any part has in ``val`` or ``test``; a ``test`` that is
    not there has none, which is said. How many are left out, and for which split, is said once. Parts that are not read
    from files (that are no :class:`densectx.data.base.FromFiles`) share no image with others.

    Args:
        parts: specs of data sets, whose channels, classes, ``ignore_index``, kind of target and scale agree.
        split: which samples to take; a part may set one to null by its own ``splits``.

    Raises:
        ConfigError: no parts, or parts that do not agree.
    """

    def __init__(self, parts: Sequence[Mapping[str, Any]], *, split: Split) -> None:
        if not parts:
            raise ConfigError("parts: empty; name at least one data set.")
        self.parts = [_part(number, spec, split) for number, spec in enumerate(parts)]
        others: tuple[Split, ...] = ("val", "test") if split == "train" else ()
        self.others = {other: [_part(number, spec, other) for number, spec in enumerate(parts)] for other in others}
        infos = [part.info for part in self.parts]
        for number, info in enumerate(infos):
            for key in _ALIKE:
                first, other = getattr(infos[0], key), getattr(info, key)
                if first != other:
                    raise ConfigError(f"parts.{number}: its {key} {other!r} differ from those of parts.0, {first!r}.")
        self.info = replace(
            infos[0],
            keys=tuple(dict.fromkeys(key for info in infos for key in info.keys)),
            size=infos[0].size if len({info.size for info in infos}) == 1 else None,
            value_range=infos[0].value_range if len({info.value_range for info in infos}) == 1 else None,
        )

    def _place_parts(self) -> None:
        """Tell the parts where their options stand, which is known only after they are built."""
        for parts in (self.parts, *self.others.values()):
            for number, part in enumerate(parts):
                part.key_path = ".".join(filter(None, (self.key_path, f"parts.{number}")))

    @cached_property
    def _held_out(self) -> list[tuple[int, Split, Dataset]]:
        """What training leaves out, with the number of the part and the split that it belongs to."""
        self._place_parts()
        found = []
        for split, parts in self.others.items():
            for number, part in enumerate(parts):
                try:
                    len(part)
                except DataError as error:
                    if split != "test" or not isinstance(error, MissingSplitError):
                        raise
                    rank_zero_info(f"{part.key_path}: its test split has no images: {error}")
                else:
                    found.append((number, split, part))
        return found

    @cached_property
    def _indices(self) -> list[list[int]]:
        """Of each part, the samples that are taken."""
        self._place_parts()
        held_out = [(number, split, _names(part) or []) for number, split, part in self._held_out]
        taken: list[list[int]] = []
        earlier: dict[str, str] = {}  # the stem of an image -> which it is for messages
        for number, part in enumerate(self.parts):
            names = _names(part)
            if names is None:
                taken.append(list(range(len(part))))
                continue
            # of its own splits only the very file: train/0001.png and val/0001.png are two images
            own = {name: split for other, split, held in held_out if other == number for name in held}
            there = dict(earlier)
            for other, split, held in held_out:
                if other != number:
                    there |= dict.fromkeys(map(_stem, held), f"with a name of parts.{other}'s {split}")
            why = Counter[str]()
            kept = []
            for i, name in enumerate(names):
                if name in own:
                    why[f"that its own {own[name]} has"] += 1
                elif where := there.get(_stem(name)):
                    why[where] += 1
                else:
                    kept.append(i)
            if why:
                reasons = ", ".join(f"{count} {where}" for where, count in why.items())
                rank_zero_info(f"{part.key_path}: {why.total()} of {len(names)} images are left out: {reasons}.")
            taken.append(kept)
            earlier = dict.fromkeys(map(_stem, names), f"with a name of parts.{number}") | earlier
        return taken

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self._indices)))

    def _place(self, index: int) -> tuple[Dataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return self.parts[part], self._indices[part][index - (self._ends[part - 1] if part else 0)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        part, own = self._place(index)
        return part[own]

    def name(self, index: int) -> str:
        """That of the part."""
        part, own = self._place(index)
        return part.name(own)

    def paths(self, index: int) -> dict[str, str]:
        """The files of a sample, see :class:`densectx.data.base.Located`."""
        part, own = self._place(index)
        return dict(part.paths(own)) if isinstance(part, Located) else {}

    def all_files(self) -> list[str]:
        """Those of the parts, see :class:`densectx.data.base.FromFiles`, and of the splits that training leaves out."""
        self._place_parts()
        parts = (*self.parts, *(part for _, _, part in self._held_out))
        return [path for part in parts if isinstance(part, FromFiles) for path in part.all_files()]


def _part(number: int, spec: Mapping[str, Any], split: Split) -> Dataset:
    part: Dataset = DATASETS.build(spec, f"parts.{number}", split=split)
    return part


def _names(part: Dataset) -> list[str] | None:
    """What the samples of files are called; others have numbers, which say nothing about those of another part."""
    return [part.name(index) for index in range(len(part))] if isinstance(part, FromFiles) else None


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]
