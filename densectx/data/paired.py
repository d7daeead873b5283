"""Two pictures of the same scene: a degraded or small one and what it should become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from densectx.data import listing
from densectx.data.base import Dataset, Split
from densectx.data.files import Files
from densectx.data.limits import check_same_size
from densectx.data.presets import preset_of
from densectx.errors import ConfigError, DataError
from densectx.types import Sample, SourceInfo


class _Entry(NamedTuple):
    image: str
    target: str | None


@final
class Paired(Dataset):
    """Pairs of pictures, matched by stem, sorted by the path of the input.

    Samples: ``image`` (channels, H, W) and ``target`` (channels, H * scale, W * scale), both float32 sRGB in [0, 1];
    ``gray``, that of the input.

    Args:
        root: the folder; relative to the working directory, ``~`` is expanded.
        split: which selection to take.
        preset: ``div2k``; options given beside it replace its own one by one.
        input: folder of the degraded pictures below root; ``{subset}`` stands for each name in a split's ``from``,
            ``{scale}`` for the scale.
        target: folder of the clean pictures.
        scale: size of a target / size of its input, a whole number; every pair is checked.
        suffix: end of the inputs' stems that the targets' do not have, such as ``x{scale}`` for ``0001x2.png``; inputs
            without are left out.
        channels: of both: 3, 1 or N, see :func:`densectx.data.reader.read_image`.
        value_range: ``[lo, hi]`` of TIFF, ``.npy`` and 16-bit PNG files, see there.
        cache: folder of decoded files, see :class:`densectx.data.cache.Cache`, or ``memory``: of each loader process,
            see :class:`densectx.data.memory_cache.MemoryCache`; null keeps none.
        splits: ``{train: {from: [subsets], include: [patterns on name or stem of inputs], labels: true}, val: ...}``;
            a split left out takes the preset's, else the subset of its own name; null gives none.

    Raises:
        ConfigError: unknown preset, no folders, or a scale that is no positive whole number.
    """

    def __init__(
        self,
        root: str,
        *,
        split: Split,
        preset: str | None = None,
        input: str | None = None,  # noqa: A002  # the name of the option
        target: str | None = None,
        scale: int | None = None,
        suffix: str | None = None,
        channels: int = 3,
        value_range: Sequence[float] | None = None,
        cache: str | None = None,
        splits: Mapping[str, Any] | None = None,
    ) -> None:
        base = preset_of("paired", preset)
        input = base.get("input") if input is None else input  # noqa: A001
        target = base.get("target") if target is None else target
        if not input or not target:
            raise ConfigError("paired needs 'input' and 'target' (folders below root), or a 'preset'.")
        if preset is not None and scale is None:
            raise ConfigError(f"paired: preset {preset!r} needs 'scale', which of its reductions to take: 2, 3 or 4.")
        scale = 1 if scale is None else scale
        if not isinstance(scale, int) or isinstance(scale, bool) or scale < 1:
            raise ConfigError(f"scale: expected a whole number of at least 1, got {scale!r}.")
        self.root = Path(root).expanduser()
        self.files = Files(channels, value_range, cache, self.root)
        suffix = str(base.get("suffix", "")) if suffix is None else suffix
        self.input, self.target, self.suffix = (
            pattern.replace("{scale}", str(scale)) for pattern in (input, target, suffix)
        )
        self.selection = listing.selections(base.get("splits"), splits)[split]
        self.info = SourceInfo(
            channels=channels,
            keys=("image", "target"),
            target="image",
            scale=scale,
            value_range=self.files.value_range,
        )

    @cached_property
    def _entries(self) -> list[_Entry]:
        if self.selection is None:
            return []
        listing.check_root(self.root, self.key_path)
        found: dict[str, _Entry] = {}
        patterns, subsets = (self.input, self.target), self.selection.subsets
        pairs = [[self.root / pattern.replace("{subset}", subset) for pattern in patterns] for subset in subsets]
        listing.check_folders([images for images, _ in pairs])
        for folders in pairs:
            images = listing.by_key(folders[0], self.files.extensions, self.suffix)
            taken = {key: path for key, path in images.items() if self.selection.takes(path)}
            if not taken:
                raise DataError(f"{folders[0]}: no image matches {', '.join(self.selection.include)}.")
            targets: Mapping[str, str] = {}
            if self.selection.labels:
                targets = listing.by_key(folders[1], self.files.extensions, labels=True)
                for key, path in taken.items():
                    if key not in targets:
                        extensions = " ".join(sorted(self.files.extensions))
                        raise DataError(f"{path}: no target {key!r} ({extensions}) in {folders[1]}.")
            found |= {path: _Entry(path, targets.get(key)) for key, path in taken.items()}
        return [found[path] for path in sorted(found)]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        image, gray = self.files.image(Path(entry.image))
        sample: Sample = {"image": image, "gray": torch.tensor(gray)}
        if entry.target:
            sample["target"], _ = self.files.image(Path(entry.target))
            check_same_size(entry.image, image, entry.target, sample["target"], self.info.scale)
        return sample

    def name(self, index: int) -> str:
        """The path of the input."""
        return self._entries[index].image

    def paths(self, index: int) -> dict[str, str]:
        """The files of a sample, see :class:`densectx.data.base.Located`."""
        entry = self._entries[index]
        return {"image": entry.image} | ({"target": entry.target} if entry.target else {})

    def all_files(self) -> list[str]:
        """The files of the split, see :class:`densectx.data.base.FromFiles`."""
        return [path for entry in self._entries for path in entry if path]
