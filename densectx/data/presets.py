"""Data sets that are only a layout of :class:`densectx.data.image_mask.ImageMask`, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Palette = tuple[tuple[int, int, int], ...]


def voc_palette(count: int) -> Palette:
    """PASCAL VOC's colours: the bits of an id spread over R, G and B, highest first (VOCdevkit, VOClabelcolormap)."""

    def channel(index: int, offset: int) -> int:
        return sum(((index >> (3 * bit + offset)) & 1) << (7 - bit) for bit in range(8))

    return tuple((channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(count))


VOC_CLASSES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # CamVid in SegNet's edition (Badrinarayanan, Kendall, Cipolla 2017): 360x480, CC BY-NC 4.0
    "camvid": {
        "images": "{subset}",
        "masks": "{subset}annot",
        "lists": "{subset}.txt",
        "classes": [
            "Sky",
            "Building",
            "Pole",
            "Road",
            "Pavement",
            "Tree",
            "SignSymbol",
            "Fence",
            "Car",
            "Pedestrian",
            "Bicyclist",
        ],
        "palette": [
            (128, 128, 128),
            (128, 0, 0),
            (192, 192, 128),
            (128, 64, 128),
            (60, 40, 222),
            (128, 128, 0),
            (192, 128, 128),
            (64, 64, 128),
            (64, 0, 128),
            (64, 64, 0),
            (0, 128, 192),
        ],
        "ignore_index": 11,
        "size": (360, 480),
    },
    # PASCAL VOC 2012 (Everingham et al.); the masks of its test split are not public
    "voc": {
        "images": "JPEGImages",
        "masks": "SegmentationClass",
        "lists": "ImageSets/Segmentation/{subset}.txt",
        "classes": VOC_CLASSES,
        "palette": voc_palette(len(VOC_CLASSES)),
        "ignore_index": 255,
        "splits": {"test": {"from": ["test"], "labels": False}},
    },
    # BSDS500 (Arbelaez et al. 2011); BSD68, CBSD68 and BSD100 are images of its val, so nothing trains on val
    "bsds500": {
        "images": "images/{subset}",
        "boundaries": "groundTruth/{subset}",
        "splits": {"train": {"from": ["train", "test"]}, "test": {"from": ["val"]}},
    },
}
