"""Dilated residual networks for Cityscapes (Yu, Koltun & Funkhouser 2017, section 5.2) as model configs.

A 1x1 convolution and a fixed bilinear deconvolution behind the network, pixels standardised by Cityscapes' own
statistics, as in fyu/drn's ``segment.py``. They come without weights; ``densectx convert drn`` fills them.
"""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any, Final

from densectx.backbones.drn_network import Arch
from densectx.data.class_names import CITYSCAPES, CITYSCAPES_PALETTE
from densectx.types import SourceInfo

MEAN: Final = (0.290101, 0.328081, 0.286964)
STD: Final = (0.182954, 0.186566, 0.184475)


def network(arch: Arch) -> dict[str, Any]:
    """The segmentation network on Cityscapes' 19 classes.

    Args:
        arch: as of backbone ``drn``.
    """
    info = SourceInfo(classes=CITYSCAPES, palette=CITYSCAPES_PALETTE, keys=("image", "mask"))
    classes = len(CITYSCAPES)
    head = {"name": "upsample", "method": "deconvolution"}
    return {
        "backbone": {"name": f"drn_{arch}", "mean": list(MEAN), "std": list(STD)},
        "projection": {"channels": classes, "activation": "none", "std": sqrt(2 / classes)},
        "context": "none",
        "tasks": {"segmentation": {"name": "segmentation", "source": "scenes", "head": head}},
        "sources": {"scenes": info.to_config()},
    }


drn_a_50 = partial(network, "a_50")
drn_c_26 = partial(network, "c_26")
drn_c_42 = partial(network, "c_42")
drn_c_58 = partial(network, "c_58")
drn_d_22 = partial(network, "d_22")
drn_d_38 = partial(network, "d_38")
drn_d_54 = partial(network, "d_54")
drn_d_105 = partial(network, "d_105")
