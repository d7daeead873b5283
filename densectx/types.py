"""Contracts shared by every part: what a feature map, a sample and a batch are. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Spec: TypeAlias = str | Mapping[str, Any]
"""A part named in a config: ``"linear"`` or ``{"name": "decoder", "width": 64}``."""

Sample: TypeAlias = "dict[str, Tensor]"
"""One sample or a collated batch of samples of one source. Keys:

``image``  (C, H, W) float32, sRGB in [0, 1]; C = 3 unless the source declares other channels
``gray``   () bool, true where the file has one channel (its image is replicated to C), false where an image of one
           channel was made of colours; where it is absent, whether the image has one channel
``mask``   (H, W) int64 class ids
``target`` (K, H * scale, W * scale) float32, any other dense target, see SourceInfo.target; NaN where unlabelled
``valid``  (H, W) bool, false where augmentation padded the image, and in its surround; absent where it did not
``surround`` () int64: so many pixels on each side of the image are what surrounds the part that is learned from: no
           label counts there, and a network need not answer for them; absent where there are none
``key``    (2,) int64: pass over the source and index in it (what randomness is counted from)

A label that a sample does not have is an absent key; in a batch it is filled with ignore or NaN.
Collated samples have a leading batch dimension.
"""

Batch: TypeAlias = "dict[str, Sample]"
"""``{source: collated sample}``; a task runs when its source is present with the keys it needs."""


class Place(NamedTuple):
    """Where a training batch stands in its window of gradient accumulation.

    Attributes:
        window: all batches of the window on this rank, as they came from the loader: the same list for each of them.
        at: index of the batch in it.
    """

    window: list[Batch]
    at: int


@runtime_checkable
class Windowed(Protocol):
    """A training loader that knows the batches of a window when it gives out the first.

    Attributes:
        place: of the batch that was given out last; None without accumulation.
    """

    place: Place | None


Terms: TypeAlias = "dict[str, tuple[Tensor, Tensor]]"
"""``{term: (sum, weight)}``: the term's value is sum / weight, both taken over all ranks."""


TargetKind: TypeAlias = Literal["none", "map", "labels", "image"]


class Feature(NamedTuple):
    """What a feature map (B, channels, H / stride, W / stride) is."""

    channels: int
    stride: int


@dataclass(frozen=True)
class SourceInfo:
    """What a model must know of a data source; travels into the checkpoint.

    Attributes:
        channels: channels of ``image``.
        classes: class names, index = id in ``mask``; empty without masks.
        palette: one (R, G, B) in 0..255 a class.
        ignore_index: id of unlabelled pixels in ``mask``.
        keys: sample keys that the source can deliver.
        size: (H, W) of training samples if all have the same, else None.
        target: what ``target`` is: ``"map"`` numbers of a field over the picture (depth, share of annotators),
            ``"labels"`` 0 or 1 for each of ``classes``, ``"image"`` another picture of the same scene, sRGB 0..1
            (recoloured together with ``image``).
        scale: size of ``target`` / size of ``image``.
        value_range: what is 0 and 1 of ``image`` in the files' own numbers, None for the rule of their type.
    """

    channels: int = 3
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    ignore_index: int = 255
    keys: tuple[str, ...] = ("image",)
    size: tuple[int, int] | None = None
    target: TargetKind = "none"
    scale: int = 1
    value_range: tuple[float, float] | None = None

    def to_config(self) -> dict[str, Any]:
        """Plain JSON types, for configs and checkpoints."""
        return {
            "channels": self.channels,
            "classes": list(self.classes),
            "palette": [list(colour) for colour in self.palette],
            "ignore_index": self.ignore_index,
            "keys": list(self.keys),
            "size": list(self.size) if self.size else None,
            "target": self.target,
            "scale": self.scale,
            "value_range": list(self.value_range) if self.value_range else None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SourceInfo:
        """The inverse of :meth:`to_config`."""
        size, limits = config.get("size"), config.get("value_range")
        return cls(
            channels=config.get("channels", 3),
            classes=tuple(config.get("classes", ())),
            palette=tuple((r, g, b) for r, g, b in config.get("palette", ())),
            ignore_index=config.get("ignore_index", 255),
            keys=tuple(config.get("keys", ("image",))),
            size=(size[0], size[1]) if size else None,
            target=config.get("target", "none"),
            scale=config.get("scale", 1),
            value_range=(limits[0], limits[1]) if limits else None,
        )


class Score(NamedTuple):
    """The metric a task is judged by, and the trivial answer it is printed beside.

    ``metric`` and ``f"{metric}_{baseline}"`` are keys of what the task's metrics compute.
    """

    metric: str
    baseline: str
    higher_is_better: bool = True
