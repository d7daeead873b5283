"""Images with labels in parallel folders: class masks, maps, a mask a class; well-known layouts are presets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from densectx.data import listing
from densectx.data.base import Dataset, Split
from densectx.data.fields import Fields, stack_labels
from densectx.data.files import Files
from densectx.data.limits import check_same_size
from densectx.data.presets import preset_of
from densectx.data.reader import EXTENSIONS
from densectx.data.remap import class_masks
from densectx.errors import ConfigError, DataError, suggest
from densectx.types import Sample, SourceInfo

CLASS = "{class}"
"""Stands for the name of each class in the pattern of ``masks``."""


class _Entry(NamedTuple):
    image: str
    mask: str | None
    target: tuple[str, ...]  # one file, or one a class


@final
class ImageMask(Dataset):
    """Pairs of an image and its labels, matched by stem, sorted by the image's path.

    Samples: ``image`` (channels, H, W) float32 sRGB in [0, 1], ``gray``, and what the folders give: ``mask`` (H, W)
    int64 in 0..K-1 or ``ignore_index``; ``target`` float32, one of: with ``boundaries`` (1, H, W) in [0, 1], the share
    of annotators who marked a boundary; with ``targets`` (target_channels, H, W), NaN where unknown; with ``{class}``
    in ``masks`` (K, H, W) of 0 and 1, and no ``mask``.

    Args:
        root: the folder; relative to the working directory, ``~`` is expanded.
        split: which selection to take.
        preset: ``ade20k``, ``bsds500``, ``camvid``, ``camvid_road``, ``cityscapes``, ``kitti``, ``kitti_road``,
            ``sbd``, ``voc`` or ``voc_aug``; options given beside it replace its own one by one (with ``classes`` its
            palette and remap do not hold). Where it has a remap, other masks than its own need one too.
        images: folder of the images below root; ``{subset}`` stands for each name in a split's ``from``.
        masks: folder of the masks; files of palette indices or gray values. With ``{class}`` a folder a class, of
            files with 0 (no) and one other value (yes).
        lists: text file that names the images of a subset, one stem or path a line. Of a path, which may begin
            elsewhere, the folders count that the image has below ``images``.
        exclude: text file, below root or absolute, of the images that every split leaves out, as ``lists``; names
            that are no images here are passed over.
        boundaries: folder of BSDS500 ground truth (``.mat``).
        targets: folder of maps of numbers, such as depth: 8- or 16-bit gray PNG, float TIFF, ``.npy``.
        target_scale: what their numbers are multiplied by.
        target_channels: numbers a pixel of theirs; other than 1 are read from TIFF and ``.npy``.
        invalid: number in their files that means unknown, e.g. 0; becomes NaN.
        suffixes: ``{images: ..., masks: ..., boundaries: ..., targets: ...}``, ends of the stems that are no part of
            what is matched; files without are left out.
        classes: class names, index = id; needed with masks.
        palette: one (R, G, B) in 0..255 a class; default PASCAL VOC's colours, with ``{class}`` without
            its first, black.
        ignore_index: id of unlabelled pixels, default 255; one that nobody gave and that a class has is refused.
        remap: ``{id or class name of the files: class name, id or "ignore"}``; ``"*"`` names all others, without it
            an id that is not named is refused, or, where classes of the preset are named, means there what it means in
            the preset. ``{}`` takes ids as they are, whatever the preset.
        colors: masks are files of colours: true for those of ``palette``, or ``{class or "ignore": [R, G, B] or a
            list of these}`` for others; a colour that is not declared is refused.
        channels: of the images: 3, 1 or N, see :func:`densectx.data.reader.read_image`.
        value_range: ``[lo, hi]`` of TIFF, ``.npy`` and 16-bit PNG images, see there.
        cache: folder of decoded files, see :class:`densectx.data.cache.Cache`, or ``memory``: of each loader process,
            see :class:`densectx.data.memory_cache.MemoryCache`; null keeps none.
        splits: ``{train: {from: [subsets], include: [patterns on name or stem], labels: true}, val: ...}``;
            a split left out takes the preset's, else the subset of its own name; null gives none.

    Raises:
        ConfigError: unknown preset, or options that do not go together.
    """

    def __init__(
        self,
        root: str,
        *,
        split: Split,
        preset: str | None = None,
        images: str | None = None,
        masks: str | None = None,
        lists: str | None = None,
        exclude: str | None = None,
        boundaries: str | None = None,
        targets: str | None = None,
        target_scale: float = 1.0,
        target_channels: int = 1,
        invalid: float | None = None,
        suffixes: Mapping[str, str] | None = None,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        ignore_index: int | None = None,
        remap: Mapping[Any, Any] | None = None,
        colors: bool | Mapping[str, Any] | None = None,
        channels: int = 3,
        value_range: Sequence[float] | None = None,
        cache: str | None = None,
        splits: Mapping[str, Any] | None = None,
    ) -> None:
        base = preset_of("image_mask", preset)
        given = {"images": images, "masks": masks, "boundaries": boundaries, "targets": targets}
        self.folders = {k: v for k, v in ((k, base.get(k) if v is None else v) for k, v in given.items()) if v}
        if "images" not in self.folders or len(self.folders) == 1:
            raise ConfigError(
                "image_mask needs 'images' and 'masks', 'boundaries' or 'targets' (folders below root), or a 'preset';"
                " for images without labels use the data set 'folder'."
            )
        multilabel = CLASS in self.folders.get("masks", "")
        kinds: list[str] = [kind for kind in ("boundaries", "targets") if kind in self.folders]
        kinds += [f"'masks' with {CLASS}"] if multilabel else []
        if len(kinds) > 1:
            raise ConfigError(f"{' and '.join(kinds)} are both targets; a source has one.")
        if multilabel and (remap is not None or colors):
            raise ConfigError("remap and colors are for masks of class ids, not for a folder of masks a class.")
        self.root = Path(root).expanduser()
        self.files = Files(channels, value_range, cache, self.root)
        self.lists: str | None = base.get("lists") if lists is None else lists
        self.exclude = exclude
        self.suffixes = _suffixes(base.get("suffixes", {}) if suffixes is None else suffixes)
        if remap is None and classes is None and not colors and "masks" in self.folders and not multilabel:
            _refuse_other_masks(preset, base, self.folders["masks"], self.suffixes.get("masks", ""))
        self.mask_extensions = base.get("mask_extensions", EXTENSIONS) if masks is None else EXTENSIONS
        self.selection = listing.selections(base.get("splits"), splits)[split]
        self.fields = Fields(target_scale, invalid, target_channels)
        self.masks, colours = class_masks(base, classes, palette, ignore_index, remap, colors, multilabel=multilabel)
        if "masks" in self.folders and not self.masks.classes:
            raise ConfigError("image_mask with 'masks' needs 'classes': the class names in the order of their ids.")
        self.info = SourceInfo(
            channels=channels,
            value_range=self.files.value_range,
            classes=self.masks.classes,
            palette=colours,
            ignore_index=self.masks.ignore_index,
            keys=(
                "image",
                *(["mask"] if "masks" in self.folders and not multilabel else []),
                *(["target"] if kinds else []),
            ),
            target="labels" if multilabel else "map" if kinds else "none",
        )

    @cached_property
    def _entries(self) -> list[_Entry]:
        if self.selection is None:
            return []
        listing.check_root(self.root, self.key_path)
        found: dict[str, _Entry] = {}
        listing.check_folders([self._folder("images", subset) for subset in self.selection.subsets])
        for subset in self.selection.subsets:
            folder = self._folder("images", subset)
            suffix = self.suffixes.get("images", "")
            images = listing.by_key(folder, self.files.extensions, suffix)
            names = self.root / self.lists.replace("{subset}", subset) if self.lists else None
            keys = listing.listed(names, images, suffix) if names else images
            taken = {key: images[key] for key in keys if self.selection.takes(images[key])}
            if not taken:
                raise DataError(f"{names or folder}: no image matches {', '.join(self.selection.include)}.")
            kept = taken
            if self.exclude is not None:
                lines = listing.lines(self.root / Path(self.exclude).expanduser(), images, suffix)
                left_out = {key for line in lines for key in line.keys}
                kept = {key: path for key, path in taken.items() if key not in left_out}
            if not kept:
                raise DataError(f"{names or folder}: 'exclude' ({self.exclude}) leaves no image of {len(taken)}.")
            masks, targets = self._label_files(subset, kept)
            found |= {path: _Entry(path, masks.get(k), tuple(t[k] for t in targets)) for k, path in kept.items()}
        return [found[path] for path in sorted(found)]

    def _folder(self, kind: str, subset: str, label: str = "") -> Path:
        return self.root / self.folders[kind].replace("{subset}", subset).replace(CLASS, label)

    def _label_files(self, subset: str, images: Mapping[str, str]) -> tuple[Mapping[str, str], list[Mapping[str, str]]]:
        """Masks, and targets (one mapping, or one a class), by the keys of the images."""
        assert self.selection is not None
        masks: Mapping[str, str] = {}
        targets: list[Mapping[str, str]] = []
        if self.selection.labels:
            if "mask" in self.info.keys:
                masks = self._matched("masks", images, self._folder("masks", subset), self.mask_extensions)
            if "boundaries" in self.folders:
                targets.append(self._matched("boundaries", images, self._folder("boundaries", subset), {".mat"}))
            if "targets" in self.folders:
                extensions = EXTENSIONS | {".npy"}
                targets.append(self._matched("targets", images, self._folder("targets", subset), extensions))
            if self.info.target == "labels":
                folders = [self._folder("masks", subset, name) for name in self.info.classes]
                targets += [self._matched("masks", images, folder, EXTENSIONS) for folder in folders]
        return masks, targets

    def _matched(
        self, kind: str, images: Mapping[str, str], folder: Path, extensions: frozenset[str] | set[str]
    ) -> Mapping[str, str]:
        suffix = self.suffixes.get(kind, "")
        labels = listing.by_key(folder, extensions, suffix, labels=True)
        for key, image in images.items():
            if key not in labels:
                known = " ".join(sorted(extensions))
                raise DataError(f"{image}: no label file {key + suffix!r} ({known}) in {folder}.")
        return labels

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        image, gray = self.files.image(Path(entry.image))
        sample: Sample = {"image": image, "gray": torch.tensor(gray)}
        if entry.mask:
            sample["mask"] = self.masks.read(Path(entry.mask), self.files)
            check_same_size(entry.image, image, entry.mask, sample["mask"])
        if entry.target:
            sample["target"] = self._target([Path(path) for path in entry.target])
            check_same_size(entry.image, image, entry.target[0], sample["target"])
        return sample

    def _target(self, paths: Sequence[Path]) -> Tensor:
        if "boundaries" in self.folders:
            return self.files.boundaries(paths[0])
        return self.fields.read(paths[0], self.files) if "targets" in self.folders else stack_labels(paths, self.files)

    def name(self, index: int) -> str:
        """The path of the image."""
        return self._entries[index].image

    def paths(self, index: int) -> dict[str, str]:
        """The files of a sample, see :class:`densectx.data.base.Located`."""
        entry = self._entries[index]
        paths = {"image": entry.image}
        if entry.mask:
            paths["mask"] = entry.mask
        if len(entry.target) == 1:
            paths["target"] = entry.target[0]
        return paths

    def all_files(self) -> list[str]:
        """The files of the split, see :class:`densectx.data.base.FromFiles`."""
        return [path for entry in self._entries for path in (entry.image, entry.mask, *entry.target) if path]


def _refuse_other_masks(preset: str | None, base: Mapping[str, Any], folder: str, suffix: str) -> None:
    """A preset's remap is about the ids of its own masks, which their suffix or else their folder names."""
    if "remap" not in base:
        return
    own = base.get("suffixes", {}).get("masks")
    key, known, given = ("suffixes.masks", own, suffix) if own else ("masks", base["masks"], folder)
    if PurePosixPath(given) != PurePosixPath(known):
        count, first = len(base["classes"]), base["classes"][0]
        raise ConfigError(
            f"{key}: {given!r} takes the place of {known!r}, whose ids preset {preset!r} turns into classes; say what"
            f" these files hold: remap: {{}} if the class ids 0..{count - 1}, remap: {{{first}: {first}}} if the same"
            " ids as the preset's, else remap: {id: class, ...}."
        )


def _suffixes(value: Mapping[str, str]) -> dict[str, str]:
    known = ("images", "masks", "boundaries", "targets")
    for key in value:
        if key not in known:
            raise ConfigError(f"suffixes: unknown folder {key!r}{suggest(str(key), known)} Known: {', '.join(known)}.")
    return {key: os.fspath(suffix) for key, suffix in value.items()}
