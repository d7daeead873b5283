"""The networks of Yu & Koltun (2016) as model configs: ``datasets/*.json`` and ``models/*.prototxt`` of fyu/dilation.

They come without weights; ``densectx convert caffe`` fills them from the published files, whose class order they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from densectx.data.class_names import CITYSCAPES, CITYSCAPES_PALETTE, ROAD, ROAD_PALETTE, VOC
from densectx.palette import Palette, voc_palette
from densectx.types import SourceInfo

_VOC_MEAN: Final = (102.93, 111.36, 116.52)


def frontend_vgg16() -> dict[str, Any]:
    """The front end alone, on PASCAL VOC's 21 classes (section 4, table 2)."""
    return _network("none", VOC, voc_palette(len(VOC)), _VOC_MEAN, (900, 900))


def dilation8_pascal_voc() -> dict[str, Any]:
    """Front end and Large context, padded once by 33 cells (section 5, tables 3 and 4)."""
    context = {"name": "large", "padding": "once"}
    return _network(context, VOC, voc_palette(len(VOC)), _VOC_MEAN, (900, 900))


def dilation8_camvid() -> dict[str, Any]:
    """Front end and Basic context on CamVid (appendix A.1, table 5)."""
    return _network("basic", ROAD, ROAD_PALETTE, (110.70313206, 108.77808759, 105.41212523), (900, 1100))


def dilation7_kitti() -> dict[str, Any]:
    """Front end and a context of 7 layers on KITTI (appendix A.2, table 6)."""
    return _network("context7", ROAD, ROAD_PALETTE, (96.19429688, 95.55136972, 91.34692262), (852, 1640))


def dilation10_cityscapes() -> dict[str, Any]:
    """Front end and a context of 10 layers on Cityscapes, fixed deconvolution at the end (appendix A.3, table 7)."""
    mean = (72.39, 82.91, 73.16)
    return _network("context10", CITYSCAPES, CITYSCAPES_PALETTE, mean, (1396, 1396), "deconvolution")


def _network(
    context: Any,
    classes: Sequence[str],
    palette: Palette,
    mean: Sequence[float],
    tile: Sequence[int],
    method: Literal["interp_map", "deconvolution"] = "interp_map",
) -> dict[str, Any]:
    info = SourceInfo(classes=tuple(classes), palette=tuple(palette), keys=("image", "mask"))
    return {
        "backbone": {"name": "frontend_vgg16", "mean": list(mean), "tile": list(tile)},
        "projection": {"channels": len(classes), "activation": "none", "std": 0.001},
        "context": context,
        "tasks": {
            "segmentation": {
                "name": "segmentation",
                "source": "scenes",
                "head": {"name": "upsample", "method": method},
            }
        },
        "sources": {"scenes": info.to_config()},
    }
