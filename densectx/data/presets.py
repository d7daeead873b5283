"""Data sets that are only a layout of a general one, as plain data: data set -> preset -> its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from densectx.data import class_names as names
from densectx.errors import ConfigError, unknown
from densectx.palette import voc_palette

_VOC = {
    "images": "JPEGImages",
    "masks": "SegmentationClass",
    "lists": "ImageSets/Segmentation/{subset}.txt",
    "classes": names.VOC,
    "palette": voc_palette(len(names.VOC)),
    "ignore_index": 255,
    "splits": {"test": {"from": ["test"], "labels": False}},
}

_CITYSCAPES = {
    "classes": names.CITYSCAPES,
    "palette": names.CITYSCAPES_PALETTE,
    "ignore_index": 255,
    "remap": dict.fromkeys(range(-1, 34), "ignore") | {old: new for new, old in enumerate(names.CITYSCAPES_IDS)},
}

# Cityscapes' labelIds of each class of names.ROAD; walls are buildings, lights signs, terrain trees, trucks, buses and
# trains cars, riders and motorcycles bicyclists
_ROAD_IDS = ((11, 12), (21, 22), (23,), (26, 27, 28, 31), (19, 20), (7,), (24,), (13,), (17,), (8,), (25, 32, 33))
_ROAD_REMAP = {old: new for new, ids in enumerate(_ROAD_IDS) for old in ids}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "folder": {
        # DIV2K (Agustsson, Timofte 2017); its 800 + 100 images in full resolution
        "div2k": {
            "splits": {"train": {"from": ["DIV2K_train_HR"]}, "val": {"from": ["DIV2K_valid_HR"]}, "test": None},
        },
    },
    "paired": {
        # the same with its bicubic reductions, X2, X3 or X4 by 'scale'
        "div2k": {
            "input": "DIV2K_{subset}_LR_bicubic/X{scale}",
            "target": "DIV2K_{subset}_HR",
            "suffix": "x{scale}",
            "splits": {"val": {"from": ["valid"]}, "test": None},
        },
    },
    "image_mask": {
        # scene parsing of ADE20K (Zhou et al. 2017), folder ADEChallengeData2016: 0 is "other", classes are 1..150
        "ade20k": {
            "images": "images/{subset}",
            "masks": "annotations/{subset}",
            "classes": names.ADE20K,
            "palette": voc_palette(len(names.ADE20K)),
            "ignore_index": 255,
            "remap": {0: "ignore"} | {old + 1: old for old in range(len(names.ADE20K))},
            "splits": {
                "train": {"from": ["training"]},
                "val": {"from": ["validation"]},
                "test": None,
            },
        },
        # BSDS500 (Arbelaez et al. 2011); BSD68, CBSD68 and BSD100 are images of its val, so nothing trains on val
        "bsds500": {
            "images": "images/{subset}",
            "boundaries": "groundTruth/{subset}",
            "splits": {"train": {"from": ["train", "test"]}, "test": {"from": ["val"]}},
        },
        # CamVid in SegNet's edition (Badrinarayanan, Kendall, Cipolla 2017): 360x480, CC BY-NC 4.0
        "camvid": {
            "images": "{subset}",
            "masks": "{subset}annot",
            "lists": "{subset}.txt",
            "classes": names.CAMVID,
            "palette": names.CAMVID_PALETTE,
            "ignore_index": 11,
        },
        # the same in the names and order of Yu & Koltun's published weights
        "camvid_road": {
            "images": "{subset}",
            "masks": "{subset}annot",
            "lists": "{subset}.txt",
            "classes": names.ROAD,
            "palette": names.ROAD_PALETTE,
            "ignore_index": 255,
            "remap": {11: "ignore"} | {old: new for new, old in enumerate((1, 5, 0, 8, 6, 3, 9, 7, 2, 4, 10))},
        },
        # Cityscapes (Cordts et al. 2016), fine annotations; the masks of its test split are not public
        "cityscapes": {
            **_CITYSCAPES,
            "images": "leftImg8bit/{subset}",
            "masks": "gtFine/{subset}",
            "suffixes": {"images": "_leftImg8bit", "masks": "_gtFine_labelIds"},
            "splits": {"test": {"from": ["test"], "labels": False}},
        },
        # semantic segmentation of KITTI (Alhaija et al. 2018): 200 labelled images, and no official validation split
        "kitti": {
            **_CITYSCAPES,
            "images": "{subset}/image_2",
            "masks": "{subset}/semantic",
            "splits": {"train": {"from": ["training"]}, "val": None, "test": {"from": ["testing"], "labels": False}},
        },
        # the same in the 11 classes of Yu & Koltun's tables, put together as CamVid's are
        "kitti_road": {
            "images": "{subset}/image_2",
            "masks": "{subset}/semantic",
            "classes": names.ROAD,
            "palette": names.ROAD_PALETTE,
            "ignore_index": 255,
            "remap": dict.fromkeys(range(-1, 34), "ignore") | _ROAD_REMAP,
            "splits": {"train": {"from": ["training"]}, "val": None, "test": {"from": ["testing"], "labels": False}},
        },
        # Semantic Boundaries Dataset (Hariharan et al. 2011), folder benchmark_RELEASE; shares images with VOC's val
        "sbd": {
            "images": "dataset/img",
            "masks": "dataset/cls",
            "mask_extensions": frozenset({".mat"}),
            "lists": "dataset/{subset}.txt",
            "classes": names.VOC,
            "palette": voc_palette(len(names.VOC)),
            "ignore_index": 255,
            "splits": {"test": None},
        },
        # PASCAL VOC 2012 (Everingham et al.); the masks of its test split are not public
        "voc": _VOC,
        # VOC with SBD's masks for the images that VOC itself does not label: 10 582 for training, none of VOC's val
        "voc_aug": {
            **_VOC,
            "masks": "SegmentationClassAug",
            "splits": {"train": {"from": ["trainaug"]}, "test": {"from": ["test"], "labels": False}},
        },
    },
}


def preset_of(dataset: str, name: str | None) -> Mapping[str, Any]:
    """The options of a preset; none without a name.

    Raises:
        ConfigError: unknown name.
    """
    if name is None:
        return {}
    if name not in PRESETS[dataset]:
        raise ConfigError(f"preset: {unknown('preset', name, PRESETS[dataset])}")
    return PRESETS[dataset][name]
