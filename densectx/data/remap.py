"""From what a mask file holds, ids or colours, to the class ids of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densectx.data.files import Files
from densectx.data.listing import strings
from densectx.errors import ConfigError, DataError, suggest
from densectx.palette import voc_palette

IGNORE, REST = "ignore", "*"
_SHOWN = 8  # ids or colours that a message names
_DENSE = 1 << 16  # ids that are counted and mapped by a table

Colours = tuple[tuple[int, int, int], ...]


def class_masks(
    base: Mapping[str, Any],
    classes: Sequence[str] | None,
    palette: Sequence[Sequence[int]] | None,
    ignore_index: int | None,
    remap: Mapping[Any, Any] | None,
    colours: Mapping[str, Any] | bool | None,
    *,
    multilabel: bool = False,
) -> tuple[ClassMasks, Colours]:
    """The classes that options of a config, beside those of a preset, give; and their palette.

    A preset's palette and remap belong to its classes: where ``classes`` are given they do not hold. Names in
    ``remap`` are the preset's classes, or, without one, ``classes``. One that names the preset's classes is about files
    in the preset's ids, so without ``classes`` or ``"*"`` what it does not name stays as it is there. An empty one
    takes ids as they are.

    With ``multilabel``, a mask a class, there are no ids, and no class is the background, which the default palette
    has black.

    Raises:
        ConfigError: as :class:`ClassMasks`, a palette of another length, or an ``ignore_index`` that nobody gave is the
            id of a class.
    """
    own = strings("classes", base.get("classes"))
    names = own if classes is None else strings("classes", classes)
    if len(set(names)) != len(names):
        raise ConfigError(f"classes: {sorted({n for n in names if names.count(n) > 1})[0]!r} is named twice.")
    given = palette
    if given is None:
        default = voc_palette(len(names) + 1)[1:] if multilabel else voc_palette(len(names))
        given = base["palette"] if classes is None and "palette" in base else default
    if len(given) != len(names):
        raise ConfigError(f"palette: {len(given)} colours for {len(names)} classes; give one a class.")
    table = palette_of("palette", given)
    ignore = base.get("ignore_index", 255) if ignore_index is None else ignore_index
    if ignore_index is None and ignore < len(names) and not multilabel:
        raise ConfigError(
            f"ignore_index: {ignore}, {'that of the preset' if 'ignore_index' in base else 'the default'}, is the id of"
            f" class {names[ignore]!r}, which nothing would learn or measure; set it to the id of unlabelled pixels, or"
            f" to one that no class has, such as {max(255, len(names))}."
        )
    if remap is None and classes is None and not colours:
        remap = base.get("remap")
    file_ids = {name: [i] for i, name in enumerate(own or names)}
    if "remap" in base:
        file_ids = {name: [old for old, new in base["remap"].items() if new == i] for i, name in enumerate(own)}
    rest: Mapping[int, Any] = {}
    if own and classes is None and remap is not None and REST not in remap and any(key in file_ids for key in remap):
        rest = base.get("remap") or {i: i for i in range(len(own))}
    return ClassMasks(names, table, ignore, remap, file_ids, colours, rest), table


@final
class ClassMasks:
    """Reads mask files as class ids in 0..K-1 or ``ignore_index``; anything else is refused.

    Args:
        classes: class names, index = id.
        palette: one colour a class.
        ignore_index: of unlabelled pixels.
        remap: ``{from: to}``. ``from``: an id of the files, or a name in ``names``, or ``"*"`` for every id that is not
            named; ``to``: an id or name of a class, or ``"ignore"``. Without ``"*"`` an id that is not named is
            refused; ``ignore_index`` stays itself unless it is named. None and ``{}`` take ids as they are.
        names: name -> ids of the files, for ``from``.
        colours: ``True`` takes files of colours, by the palette; a mapping ``{class or "ignore": [R, G, B] or a list of
            these}`` replaces the palette's colour of the classes it names. None and ``False`` take files of ids.
        rest: ``{id: to}`` for the ids that ``remap`` does not name.

    Raises:
        ConfigError: unknown classes, values of the wrong kind, one colour for two classes.
    """

    def __init__(
        self,
        classes: Sequence[str],
        palette: Colours,
        ignore_index: int,
        remap: Mapping[Any, Any] | None = None,
        names: Mapping[str, Sequence[int]] | None = None,
        colours: Mapping[str, Any] | bool | None = None,
        rest: Mapping[int, Any] | None = None,
    ) -> None:
        self.classes, self.ignore_index = tuple(classes), ignore_index
        self._table: dict[int, int] | None = None
        self._rest: int | None = None
        self._colours: dict[int, int] | None = None
        if colours is not None and colours is not False:
            if remap is not None:
                raise ConfigError("remap: is for files of ids; with 'colors' name the classes there.")
            self._colours = self._colour_table(palette, {} if colours is True else colours)
        elif remap:
            self._remap(remap, names or {}, rest or {})

    def read(self, path: Path, files: Files) -> Tensor:
        """(H, W) int64.

        Raises:
            DataError: the file cannot be read, or holds an id or colour that is not declared: file, values, numbers of
                pixels and what is known are named.
        """
        if self._colours is not None:
            return self._of_colours(path, files.colours(path).numpy(), self._colours)
        mask = files.mask(path)
        ids, counts = _histogram(mask)
        to = [self._class_of(i) for i in ids.tolist()]
        bad = [(i, n) for i, n, new in zip(ids.tolist(), counts.tolist(), to, strict=True) if new is None]
        if bad:
            shown = ", ".join(f"{i} ({n} pixels)" for i, n in bad[:_SHOWN]) + (", ..." if len(bad) > _SHOWN else "")
            raise DataError(f"{path}: unknown class ids {shown}; known are {self._known()}")
        if self._table is None and self._rest is None:
            return mask
        table = torch.tensor([new for new in to if new is not None])
        return table[torch.searchsorted(ids, mask)]

    def _class_of(self, value: int) -> int | None:
        if self._table is not None and value in self._table:
            return self._table[value]
        if value == self.ignore_index:
            return value
        if self._table is not None:
            return self._rest
        return value if 0 <= value < len(self.classes) else None

    def _known(self) -> str:
        if self._table is None:
            known = f"0..{len(self.classes) - 1} and ignore_index {self.ignore_index}"
            return f"{known}. Correct the file, 'classes' or 'ignore_index'."
        ids = ", ".join(map(str, sorted(self._table)))
        return f"{ids} and ignore_index {self.ignore_index}. Correct the file, or name them in 'remap' ('*': the rest)."

    def _target(self, where: str, value: Any) -> int:
        if value == IGNORE or (value == self.ignore_index and not isinstance(value, bool)):
            return self.ignore_index
        if isinstance(value, str):
            if value not in self.classes:
                known = ", ".join([*self.classes, IGNORE])
                raise ConfigError(f"{where}: unknown class {value!r}{suggest(value, self.classes)} Known: {known}.")
            return self.classes.index(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self.classes):
            raise ConfigError(f"{where}: expected a class name, an id in 0..{len(self.classes) - 1} or {IGNORE!r}.")
        return value

    def _remap(self, remap: Mapping[Any, Any], names: Mapping[str, Sequence[int]], rest: Mapping[int, Any]) -> None:
        self._table = {}
        for key, value in remap.items():
            target = self._target(f"remap.{key}", value)
            if key == REST:
                self._rest = target
                continue
            if isinstance(key, str) and key.removeprefix("-").isdecimal():  # flags and JSON have only texts for keys
                key = int(key)
            if isinstance(key, str) and key not in names:
                known = ", ".join([*names, REST])
                raise ConfigError(f"remap: unknown class {key!r}{suggest(key, names)} Known: {known}; or give its id.")
            if not isinstance(key, int | str) or isinstance(key, bool):
                raise ConfigError(f"remap: expected ids or class names, got {key!r}.")
            for id_ in names[key] if isinstance(key, str) else [key]:
                if self._table.setdefault(id_, target) != target:
                    raise ConfigError(f"remap: id {id_} is given two targets.")
        self._table = {id_: self._target("remap", to) for id_, to in rest.items()} | self._table

    def _colour_table(self, palette: Colours, given: Any) -> dict[int, int]:
        if not isinstance(given, Mapping):
            raise ConfigError(f"colors: expected true, or a mapping of classes to [R, G, B], got {given!r}.")
        wanted = {name: [colour] for name, colour in zip(self.classes, palette, strict=True)}
        wanted |= {name: _colour_list(f"colors.{name}", value) for name, value in given.items()}
        table: dict[int, int] = {}
        for name, colours in wanted.items():
            target = self._target(f"colors.{name}", name)
            for red, green, blue in colours:
                if table.setdefault(red << 16 | green << 8 | blue, target) != target:
                    raise ConfigError(f"colors.{name}: ({red}, {green}, {blue}) is also the colour of another class.")
        return table

    def _of_colours(self, path: Path, pixels: NDArray[np.uint8], table: Mapping[int, int]) -> Tensor:
        codes = (pixels.astype(np.int32) << np.array([16, 8, 0], np.int32)).sum(-1, dtype=np.int32)
        known = np.array(sorted(table), np.int32)
        place = np.searchsorted(known, codes).clip(max=len(known) - 1)
        strange = known[place] != codes
        if strange.any():
            raise DataError(
                f"{path}: {_strange(codes, strange)}; declare them in 'palette' or 'colors', or correct it."
            )
        return torch.from_numpy(np.array([table[int(code)] for code in known], np.int64)[place])


def _histogram(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The values of a mask, rising, and how many pixels have each."""
    if int(mask.min()) >= 0 and int(mask.max()) < _DENSE:  # ten times as fast as sorting
        counts = mask.flatten().bincount()
        ids = counts.nonzero().flatten()
        return ids, counts[ids]
    values, numbers = np.unique(mask.numpy(), return_counts=True)
    return torch.from_numpy(values), torch.from_numpy(numbers)


def _strange(codes: NDArray[np.int32], where: NDArray[np.bool_]) -> str:
    values, counts = np.unique(codes[where], return_counts=True)
    shown = []
    for value, count in sorted(zip(values.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])[:_SHOWN]:
        row, column = np.unravel_index(int((codes == value).argmax()), codes.shape)
        colour = f"({value >> 16}, {value >> 8 & 255}, {value & 255})"
        shown.append(f"{colour} ({count} pixels, first at row {row}, column {column})")
    return f"undeclared colours {', '.join(shown)}" + (", ..." if len(values) > _SHOWN else "")


def _colour_list(where: str, value: Any) -> Colours:
    several = isinstance(value, list | tuple) and bool(value) and isinstance(value[0], list | tuple)
    return palette_of(where, value if several else [value])


def palette_of(where: str, value: Any) -> Colours:
    """A list of [R, G, B] from a config.

    Raises:
        ConfigError: anything else.
    """
    for colour in value:
        if (
            not isinstance(colour, list | tuple)
            or len(colour) != 3
            or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 255 for v in colour)
        ):
            raise ConfigError(f"{where}: expected [R, G, B] with values in 0..255, got {colour!r}.")
    return tuple((r, g, b) for r, g, b in value)
