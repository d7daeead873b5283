"""Pictures as they lie in the page: small, and as data inside of it."""

from __future__ import annotations

import base64
import io
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from densectx.report.markup import Html, tag

SIDE: Final = 400  # pixels of the longer side at most
_SMALL: Final = 200  # pixels of a side up to which a picture is enlarged with visible pixels
_LOSSLESS: Final = 50_000  # bytes of PNG from which on a picture becomes a JPEG
_QUALITY: Final = 90


def thumbnail(picture: Tensor, exact: bool = False) -> Tensor:
    """A picture of at most ``SIDE`` pixels a side: (C, H, W) -> (C, h, w) float32 on the CPU.

    Args:
        picture: numbers; NaN has no part in means.
        exact: take every so many pixels instead of means (for colours that mean something).
    """
    picture = picture.detach().float().cpu()
    height, width = picture.shape[-2:]
    factor = SIDE / max(height, width)
    if factor >= 1:
        return picture
    size = max(1, round(height * factor)), max(1, round(width * factor))
    if exact:
        return F.interpolate(picture[None], size, mode="nearest-exact")[0]
    known = ~picture.isnan()
    means = F.interpolate(torch.stack([picture.nan_to_num(), known.float()]), size, mode="area")
    return torch.where(means[1] > 0, means[0] / means[1].clamp_min(1e-6), torch.nan)


def embedded(picture: Image.Image | Tensor, description: str, element: str = "img", **place: float) -> Html:
    """An ``img`` that carries its picture.

    PNG where that is small, else JPEG of high quality without subsampled colours.

    Args:
        picture: an RGB image, or (3, H, W) sRGB 0..1.
        description: what it shows, for those who do not see it.
        element: ``image`` for a part of a drawing, which describes itself.
        place: x, y, width and height there.
    """
    if isinstance(picture, Tensor):
        levels = (picture.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        picture = Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))
    kind, data = "png", _bytes(picture, "PNG", optimize=True)
    if len(data) > _LOSSLESS:
        jpeg = _bytes(picture, "JPEG", quality=_QUALITY, subsampling=0)
        kind, data = ("jpeg", jpeg) if len(jpeg) < len(data) else (kind, data)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    shown = "pixels" if max(picture.size) <= _SMALL else None
    if element == "image":
        return tag("image", href=source, class_=shown, **place)
    return tag("img", src=source, alt=description, width=picture.width, height=picture.height, class_=shown)


def _bytes(picture: Image.Image, kind: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
