"""Trained models of densectx. Each function gives the file of a model; importing this imports no torch."""

from __future__ import annotations

from pathlib import Path

from densectx.errors import CheckpointError

WEIGHTS = Path(__file__).parent / "weights"


def denoise_gray() -> Path:
    """Gray denoising, sigma 0 to 55, told or estimated."""
    return _file("denoise-gray", "denoise_gray")


def denoise_color() -> Path:
    """Colour denoising, sigma 0 to 55, told or estimated."""
    return _file("denoise-color", "denoise_color")


def sr_x2() -> Path:
    """Enlargement by 2."""
    return _file("sr-x2", "sr_x2")


def sr_x3() -> Path:
    """Enlargement by 3."""
    return _file("sr-x3", "sr_x3")


def sr_x4() -> Path:
    """Enlargement by 4."""
    return _file("sr-x4", "sr_x4")


def colorize() -> Path:
    """Colour from lightness."""
    return _file("colorize", "colorize")


def segment_camvid() -> Path:
    """Road scenes in CamVid's 11 classes."""
    return _file("segment-camvid", "camvid_small")


def multitask() -> Path:
    """The four tasks from one trunk."""
    return _file("multitask", "multitask")


def _file(name: str, recipe: str) -> Path:
    """The weights of a model.

    Raises:
        CheckpointError: this release of the package does not have them.
    """
    file = WEIGHTS / f"{name}.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"densectx-zoo has no weights of {name!r} in this release; train them: densectx fit -c"
            f" configs/recipes/{recipe}.yaml, then `python benchmarks/zoo.py {name} RUN`."
        )
    return file
