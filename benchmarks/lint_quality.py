"""How well ``densectx lint`` tells shifted pairs, and copies between training and validation, on photographs.

    python benchmarks/lint_quality.py [--images 100]

Photographs are those of BSDS500 under DENSECTX_DATA, else crops of the ``mosaic`` scenes. Pairs: a clean picture with
its degraded copy (noise of sigma 25, reduced and enlarged, JPEG at quality 20, darkened) in its place, or some pixels
beside it; told is a shift of exactly so much. Copies: pictures that were compressed again, reduced, darkened or cropped
by some percent, each against all the others; told is the right pair. False alarms are shifts said of pairs in their
place, and pairs of different photographs that are said to be near. What is measured is what lint calls
(``densectx.data.alignment`` and ``.likeness``). Writes ``benchmarks/results/lint-quality.json``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import RESULTS, commit, machine
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from densectx.data.alignment import compare
from densectx.data.likeness import near, print_of
from densectx.data.mosaic import Mosaic
from densectx.data.reader import read_image
from densectx.nn.resize import bicubic

SHIFTS = ((0, 0), (0, 1), (1, 1), (0, 2), (-2, 3), (4, -4), (0, 8), (-12, 7))
MARGIN = 16  # pixels around the crop, from which shifted ones are taken


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=100)
    given = parser.parse_args()
    start = time.perf_counter()
    origin, images = photographs(given.images)
    result = {
        "name": "lint-quality",
        "command": f"python benchmarks/lint_quality.py {shlex.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "machine": machine(),
        "images": origin,
        "shifted_pairs": pairs(images),
        "copies": copies(images),
        "wall_s": round(time.perf_counter() - start, 1),
    }
    (RESULTS / "lint-quality.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({k: result[k] for k in ("shifted_pairs", "copies")}, indent=1) + "\n")
    return 0


def photographs(count: int) -> tuple[str, list[Tensor]]:
    """Where they come from, and (3, H, W) in 0..1."""
    root = os.environ.get("DENSECTX_DATA")
    if root:
        files = sorted((Path(root) / "bsds500" / "images").rglob("*.jpg"))[:count]
        return f"{len(files)} of BSDS500", [read_image(file)[0].clone() for file in files]
    scenes = Mosaic(split="train", size=321, length=count)
    return f"{count} of the mosaic scenes", [scenes[number]["image"] for number in range(count)]


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Compressed and read again."""
    file = io.BytesIO()
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(
        file, "JPEG", quality=quality
    )
    return pil_to_tensor(Image.open(file)).float() / 255


def noisy(image: Tensor) -> Tensor:
    """With noise of sigma 25, drawn for the picture."""
    return image + 25 / 255 * torch.randn(image.shape, generator=torch.Generator().manual_seed(int(image.sum())))


def blurred(image: Tensor) -> Tensor:
    """A quarter of the size and back."""
    even = image[:, : image.shape[1] // 4 * 4, : image.shape[2] // 4 * 4]
    return F.pad(bicubic(bicubic(even[None], down=4), up=4), (0, 3, 0, 3), mode="replicate")[
        0, :, : image.shape[1], : image.shape[2]
    ]


DEGRADED: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "noise 25": noisy,
    "blur of x4": blurred,
    "JPEG 20": lambda x: jpeg(x, 20),
    "half as light": lambda x: x / 2,
}


def pairs(images: list[Tensor]) -> dict[str, Any]:
    """{degradation: {shift: shares of told, other and unknown}}; at 0,0 ``other`` are false alarms."""
    found: dict[str, Any] = {}
    for name, change in DEGRADED.items():
        found[name] = {}
        for down, right in SHIFTS:
            outcomes = {"told": 0, "other": 0, "unknown": 0}
            for image in images:
                whole = change(image)
                height, width = (size - 2 * MARGIN for size in image.shape[1:])
                target = image[:, MARGIN : MARGIN + height, MARGIN : MARGIN + width]
                top, left = MARGIN + down, MARGIN + right
                pair = compare(whole[:, top : top + height, left : left + width], target)
                said = "unknown" if pair.shift is None else "told" if pair.shift == (down, right) else "other"
                outcomes[said] += 1
            found[name][f"{down},{right}"] = {key: round(n / len(images), 3) for key, n in outcomes.items()}
    return found


def cropped(share: float) -> Callable[[Tensor], Tensor]:
    """So much of each side cut off at all four borders."""

    def crop(image: Tensor) -> Tensor:
        rows, columns = (round(size * share) for size in image.shape[1:])
        return image[:, rows : image.shape[1] - rows, columns : image.shape[2] - columns]

    return crop


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "JPEG 90": lambda x: jpeg(x, 90),
    "JPEG 50": lambda x: jpeg(x, 50),
    "JPEG 20": lambda x: jpeg(x, 20),
    "half the size": lambda x: F.interpolate(x[None], scale_factor=0.5, mode="area")[0],
    "darkened by a tenth": lambda x: x * 0.9,
    "noise 10": lambda x: (x + 10 / 25 * (noisy(x) - x)).clamp(0, 1),
    "cropped by 1 %": cropped(0.01),
    "cropped by 3 %": cropped(0.03),
    "cropped by 10 %": cropped(0.1),
    "mirrored": lambda x: x.flip(2),
}


def copies(images: list[Tensor]) -> dict[str, Any]:
    """Shares of copies that are found, and how many of the pairs of different photographs are said to be near."""
    prints = [print_of(image) for image in images]
    kept = [index for index, one in enumerate(prints) if one is not None]
    mine = [one for one in prints if one is not None]
    found: dict[str, Any] = {}
    for name, change in COPIES.items():
        changed = [(index, print_of(change(images[index]))) for index in kept]
        theirs = [(index, one) for index, one in changed if one is not None]
        said = {(kept[a], theirs[b][0]) for a, b in near(mine, [one for _, one in theirs])}
        found[name] = {
            "found": round(sum(a == b for a, b in said) / len(images), 3),
            "wrong": sum(a != b for a, b in said),
        }
    said = [(a, b) for a, b in near(mine, mine) if a < b]
    return {
        "by_change": found,
        "different_photographs": {"pairs": len(mine) * (len(mine) - 1) // 2, "said_to_be_near": len(said)},
    }


if __name__ == "__main__":
    sys.exit(main())
