"""What the metrics of classes share: keys by class name, and intersections over unions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor


def class_keys(measure: str, names: Sequence[str]) -> list[str]:
    """``<measure>_<name>`` for each class, as keys of metrics: what is no ASCII letter or digit becomes ``_``.

    A class whose key is taken by one before it gets its id behind it: ``iou_pole_3``.
    """
    keys: list[str] = []
    for index, name in enumerate(names):
        key = f"{measure}_{re.sub(r'[^0-9A-Za-z]+', '_', name).strip('_') or index}"
        while key in keys:
            key = f"{key}_{index}"
        keys.append(key)
    return keys


def iou_values(measure: str, mean: str, names: Sequence[str], hits: Tensor, union: Tensor) -> dict[str, Tensor]:
    """Intersection over union of each class and their mean, from counts (K,) and (K,) float64; fractions.

    A class that occurs neither in truth nor in prediction has NaN and is left out of the mean.

    Args:
        measure: what the keys of classes begin with.
        mean: key of the mean.
        names: of the classes; empty for the mean alone.
        hits: pixels of the class in truth and prediction.
        union: pixels of the class in truth or prediction.
    """
    iou = hits / union
    keys = class_keys(measure, names)
    return {mean: iou[union > 0].mean(), **dict(zip(keys, iou, strict=bool(names)))}
