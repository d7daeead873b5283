"""A table of samples: a CSV file that names images, their labels, splits and checksums."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch

from densectx.data.base import Dataset, MissingSplitError, Split
from densectx.data.cache import content_digest
from densectx.data.fields import Fields
from densectx.data.files import Files
from densectx.data.limits import check_same_size
from densectx.data.listing import SPLITS, missing, where_to_look
from densectx.data.remap import class_masks
from densectx.errors import ConfigError, DataError, suggest
from densectx.types import Sample, SourceInfo

FILES = ("image", "mask", "target")
CHECKSUMS = {"image": "sha256", "mask": "mask_sha256", "target": "target_sha256"}
COLUMNS = (*FILES, "split", *CHECKSUMS.values())
_SLIP = 0.8  # likeness from which a column of another name is taken for a slip of the keyboard


class _Row(NamedTuple):
    line: int
    split: str
    files: dict[str, str]  # column -> path
    sha256: dict[str, str]  # column -> 64 hexadecimal digits


@final
class Manifest(Dataset):
    """Samples of a CSV file (RFC 4180, UTF-8, commas), in the order of its lines.

    The first line names the columns. ``image`` is needed; ``mask``, ``target``, ``split`` and the checksums ``sha256``
    (of the image), ``mask_sha256`` and ``target_sha256`` are optional. Other columns are passed over, but a name that
    looks like one of these is refused. An empty cell of a label means that the sample does not have it, one of a
    checksum that it is not checked. A file that one table gives to several splits is refused.

    Samples: ``image`` (channels, H, W) float32 sRGB in [0, 1], ``gray``, and what the row has of ``mask`` (H, W) int64
    and ``target`` float32: a map (target_channels, H, W) with NaN where unknown, or a picture
    (channels, H * scale, W * scale).

    Args:
        file: the CSV file; relative to the working directory, ``~`` is expanded. With ``{split}`` in its name there
            is a file a split, without a column ``split``.
        split: which rows to take.
        root: what paths in the file are relative to; default the folder of the file.
        target: what the column ``target`` holds: ``map``, numbers of a field, or ``image``, another picture.
        scale: size of a target / size of its image; other than 1 for pictures only.
        target_scale: what the numbers of maps are multiplied by.
        target_channels: numbers a pixel of maps.
        invalid: number in maps that means unknown; becomes NaN.
        classes: class names, index = id; needed with masks.
        palette: one (R, G, B) in 0..255 a class; default PASCAL VOC's colours.
        ignore_index: id of unlabelled pixels, default 255; one that nobody gave and that a class has is refused.
        remap: see :class:`densectx.data.image_mask.ImageMask`.
        colors: see there.
        channels: of the images: 3, 1 or N, see :func:`densectx.data.reader.read_image`.
        value_range: ``[lo, hi]`` of TIFF, ``.npy`` and 16-bit PNG images, see there.
        cache: folder of decoded files, see :class:`densectx.data.cache.Cache`, or ``memory``: of each loader process,
            see :class:`densectx.data.memory_cache.MemoryCache`; null keeps none.

    Raises:
        ConfigError: options that do not go together.
    """

    def __init__(
        self,
        file: str,
        *,
        split: Split,
        root: str | None = None,
        target: Literal["map", "image"] | None = None,
        scale: int = 1,
        target_scale: float = 1.0,
        target_channels: int = 1,
        invalid: float | None = None,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        ignore_index: int | None = None,
        remap: Mapping[Any, Any] | None = None,
        colors: bool | Mapping[str, Any] | None = None,
        channels: int = 3,
        value_range: Sequence[float] | None = None,
        cache: str | None = None,
    ) -> None:
        if target not in (None, "map", "image"):
            raise ConfigError(f"target: expected 'map' or 'image', got {target!r}.")
        if scale < 1 or (scale > 1 and target != "image"):
            raise ConfigError(f"scale: {scale} is for target: image, a whole number of at least 1.")
        self.split, self.by_file = split, "{split}" in file
        self.file = Path(file.replace("{split}", split)).expanduser()
        self.root = self.file.parent if root is None else Path(root).expanduser()
        self.files = Files(channels, value_range, cache, self.root)
        self.fields = Fields(target_scale, invalid, target_channels)
        self.masks, colours = class_masks({}, classes, palette, ignore_index, remap, colors)
        self.info = SourceInfo(
            channels=channels,
            classes=self.masks.classes,
            palette=colours,
            ignore_index=self.masks.ignore_index,
            keys=("image", *(["mask"] if classes else []), *(["target"] if target else [])),
            target=target or "none",
            scale=scale,
            value_range=self.files.value_range,
        )

    @cached_property
    def _rows(self) -> list[_Row]:
        if missing(self.file):
            said = f"the manifest cannot be read: No such file{where_to_look(self.file)}"
            raise MissingSplitError(f"{self.file}: {said}.", "file").within(self.key_path)
        lines = _table(self.file)
        number, header = next(lines, (1, []))
        columns = self._columns(header)
        rows: list[_Row] = []
        splits: dict[str, tuple[str, int]] = {}
        for number, cells in lines:
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise DataError(f"{self.file}, line {number}: {len(cells)} cells, the header has {len(header)}.")
            row = self._row(number, {name: cells[place].strip() for name, place in columns.items()})
            first, line = splits.setdefault(os.path.abspath(row.files["image"]), (row.split, number))
            if first != row.split:
                raise DataError(
                    f"{self.file}, line {number}: {row.files['image']} is in split {row.split!r}, and in {first!r} by"
                    f" line {line}; an image belongs to one split."
                )
            rows.append(row)
        if not rows:
            raise DataError(f"{self.file}: has no rows.")
        return [row for row in rows if row.split == self.split]

    def _columns(self, header: Sequence[str]) -> dict[str, int]:
        """Place of each known column."""
        names = [name.strip() for name in header]
        where = f"{self.file}, line 1"
        for name in names:
            if name not in COLUMNS and (near := get_close_matches(name, COLUMNS, 1, _SLIP)):
                raise DataError(
                    f"{where}: unknown column {name!r}; did you mean {near[0]!r}? Known: {', '.join(COLUMNS)}."
                )
        found = {name: place for place, name in enumerate(names) if name in COLUMNS}
        twice = [name for name in found if names.count(name) > 1]
        wanted = [
            "image",
            *(["mask"] if self.info.classes else []),
            *(["target"] if self.info.target != "none" else []),
        ]
        missing = [name for name in wanted if name not in found]
        if twice or missing:
            what = f"column {twice[0]!r} is there twice" if twice else f"no column {missing[0]!r}"
            raise DataError(f"{where}: {what}; the header is {','.join(names)!r}.")
        for name, option in (("mask", "'classes', the class names"), ("target", "'target': map or image")):
            if name in found and name not in wanted:
                raise ConfigError(f"{where}: the column {name!r} needs the option {option}; or rename the column.")
        if ("split" in found) == self.by_file:
            fix = "leave one of them out" if self.by_file else "add one, or name a file a split: file: '{split}.csv'"
            has = "has a column 'split' beside {split} in its name" if self.by_file else "no column 'split'"
            raise DataError(f"{where}: {has}; {fix}.")
        return found

    def _row(self, number: int, cells: Mapping[str, str]) -> _Row:
        where = f"{self.file}, line {number}"
        if not cells["image"]:
            raise DataError(f"{where}: the cell of 'image' is empty.")
        split = self.split if self.by_file else cells["split"]
        if split not in SPLITS:
            raise DataError(f"{where}: unknown split {split!r}{suggest(split, SPLITS)} Known: {', '.join(SPLITS)}.")
        sums = {kind: cells[name].lower() for kind, name in CHECKSUMS.items() if cells.get(name)}
        for kind, value in sums.items():
            if not re.fullmatch(r"[0-9a-f]{64}", value):
                raise DataError(f"{where}: {CHECKSUMS[kind]} {value!r} is no SHA-256 (64 hexadecimal digits).")
        return _Row(number, split, {k: os.path.join(self.root, cells[k]) for k in FILES if cells.get(k)}, sums)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        try:
            return self._sample(row)
        except DataError as error:
            raise DataError(f"{self.file}, line {row.line}: {error}") from None

    def _sample(self, row: _Row) -> Sample:
        paths = {kind: Path(path) for kind, path in row.files.items()}
        for kind, expected in row.sha256.items():
            if kind in paths and (found := content_digest(paths[kind]).hex()) != expected:
                raise DataError(
                    f"{paths[kind]}: its SHA-256 is {found[:12]}..., expected {expected[:12]}...: it is damaged or was"
                    " changed; replace it, or correct the manifest."
                )
        image, gray = self.files.image(paths["image"])
        sample: Sample = {"image": image, "gray": torch.tensor(gray)}
        if "mask" in paths:
            sample["mask"] = self.masks.read(paths["mask"], self.files)
            check_same_size(paths["image"], image, paths["mask"], sample["mask"])
        if "target" in paths:
            if self.info.target == "image":
                sample["target"], _ = self.files.image(paths["target"])
            else:
                sample["target"] = self.fields.read(paths["target"], self.files)
            check_same_size(paths["image"], image, paths["target"], sample["target"], self.info.scale)
        return sample

    def name(self, index: int) -> str:
        """The path of the image."""
        return self._rows[index].files["image"]

    def paths(self, index: int) -> dict[str, str]:
        """The files of a sample, see :class:`densectx.data.base.Located`."""
        return dict(self._rows[index].files)

    def all_files(self) -> list[str]:
        """Those of the rows, see :class:`densectx.data.base.FromFiles`; the table may gain rows of other splits."""
        return [path for row in self._rows for path in row.files.values()]


def _table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of the line, and the cells, of each row of a CSV file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a byte-order mark
            reader = csv.reader(file, strict=True)
            for cells in reader:
                yield reader.line_num, cells
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text ({error}); save it as CSV in UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: is no CSV ({error}).") from None
