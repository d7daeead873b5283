"""The command ``densectx convert``: published weights into a file that every other command takes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from densectx.errors import CheckpointError, ConfigError
from densectx.parsing import Parser

_KINDS: Final = ("caffe", "drn", "vgg")
_DESCRIPTION: Final = """\
Turn published weights into a .safetensors file with the model's config inside, which predict, fit (init_from),
inspect and densectx.load take. Every name and shape is checked; what was taken, what starts afresh and what was left
over is printed. Pixels (BGR, means, standard deviations) belong to the model: predict needs no flags.

kinds of FILE:
  caffe  a .caffemodel of Yu & Koltun 2016 (github fyu/dilation): dilation8_pascal_voc, dilation8_camvid,
         dilation7_kitti, dilation10_cityscapes; both versions of the format, Caffe is not needed
  drn    a .pth of the dilated residual networks (github fyu/drn): a segmentation network, or a classifier, behind
         whose layers the convolution for the classes starts afresh
  vgg    ImageNet's VGG-16 of torchvision, timm (.pth, .safetensors) or Caffe (vgg_conv.caffemodel) into the front
         end; the layers behind it start afresh, and fc6 and fc7 too where FILE has no finite ones
"""
_EPILOG: Final = """\
examples:
  densectx convert caffe dilation8_pascal_voc.caffemodel --net dilation8_pascal_voc -o voc.safetensors
  densectx convert drn drn_d_22-4bd2f8ea.pth -o drn_d_22.safetensors
  densectx convert vgg vgg16-397923af.pth -o vgg16.safetensors
  densectx predict voc.safetensors photos/ -o out

Exit status: 4 where FILE is damaged or does not fit the net; `densectx --help` lists all.
"""


def main(argv: Sequence[str]) -> int:
    """Convert a file.

    Args:
        argv: the arguments behind ``convert``.

    Returns:
        The exit status 0.

    Raises:
        ConfigError: usage, an unknown net, an output that exists.
        CheckpointError: the file is damaged, or of another network.
        StorageError: the output cannot be written.
    """
    given = _parsed(argv)
    path, out = Path(given.file), Path(given.out)
    _check(path, out, overwrite=given.overwrite)
    from densectx.published.convert import convert  # torch only now: --help and usage errors are quick

    for line in convert(given.kind, path, given.net, out):
        sys.stdout.write(line + "\n")
    return 0


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("kind", choices=_KINDS, metavar="KIND", help=" | ".join(_KINDS))
    parser.add_argument("file", metavar="FILE", help="the published weights")
    parser.add_argument(
        "--net",
        metavar="NAME",
        help="the model to fill, as `densectx list models` prints it (default: the one whose layers FILE has; for vgg"
        " frontend_vgg16)",
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists (it is refused otherwise)")
    return parser.parse_args(list(argv))


def _check(path: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse before any work what cannot be read or must not be written."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"-o {out}: expected a name that ends in .safetensors.")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if out.exists() and os.path.samefile(path, out):
        raise ConfigError(f"-o {out}: is the file that is read; choose another name.")
    if out.is_dir() or (os.path.lexists(out) and not overwrite):
        raise ConfigError(f"-o {out}: exists; choose another name, or give --overwrite.")
