"""Count how often each of the 313 bins of chroma occurs: the file that ``colorization`` takes as ``prior``.

    python benchmarks/ab_prior.py FOLDER... -o FILE

The one that densectx ships:

    python benchmarks/ab_prior.py $DENSECTX_DATA/bsds500/images/train $DENSECTX_DATA/bsds500/images/test \
        -o densectx/nn/ab_prior.json

Rule: every pixel of every colour file of the folders (gray files are left out), at full size, sRGB to CIE Lab (D65),
counts for the bin whose centre is nearest in (a, b).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from densectx.data.listing import files
from densectx.data.reader import read_image
from densectx.nn.ab_bins import BINS, AbBins
from densectx.nn.colour import rgb_to_lab


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", nargs="+", type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    given = parser.parse_args(arguments)
    paths = [path for folder in given.folder for path in files(folder)]
    counts, images = count(paths)
    result = {
        "what": "pixels of each of the 313 bins of chroma (nearest centre in ab; sRGB to CIE Lab, D65; full size)",
        "command": "python benchmarks/ab_prior.py FOLDER... -o FILE",
        "folders": ["/".join(folder.resolve().parts[-3:]) for folder in given.folder],
        "images": images,
        "counts": counts,
    }
    given.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 0


@torch.no_grad()
def count(paths: list[Path]) -> tuple[list[int], int]:
    """Pixels of each bin over colour files, and how many those files are."""
    bins, counts, images = AbBins(), torch.zeros(BINS, dtype=torch.long), 0
    for path in paths:
        image, gray = read_image(path)
        if not gray:
            ab = rgb_to_lab(image[None])[0, 1:].flatten(1).T
            counts += torch.bincount(bins.nearest(ab)[0][:, 0], minlength=BINS)
            images += 1
    return counts.tolist(), images


if __name__ == "__main__":
    sys.exit(main())
