"""Pictures that are read and answered window by window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densectx.data.windowed import WindowedFile
from densectx.errors import NumericError
from densectx.inference.predictor import Predictor
from densectx.inference.sinks import FileSink, Layout
from densectx.nn.colour import grey
from densectx.palette import voc_palette
from densectx.tasks.base import Options
from densectx.types import SourceInfo

_LOOK: Final = 1024  # pixels of the side of the middle that run-time options are estimated from


def suffixes(predictor: Predictor, *, raw: bool) -> dict[str, list[str]]:
    """What follows the stem of a picture that is answered by windows, by task."""
    return {key: [".tif", *([".npy"] if raw else [])] for key in predictor.tasks}


def options_of(predictor: Predictor, source: WindowedFile, say: Callable[[str], None]) -> Options:
    """Run-time options; what would be estimated from the whole picture is estimated from its middle."""
    if not any(predictor.model.task(key).options for key in predictor.tasks):
        return {}
    _, height, width = source.shape
    step = predictor.tiling.step
    firsts = (max(size - _LOOK, 0) // 2 // step * step for size in (height, width))  # as windows start
    rows, columns = (
        slice(first, min(first + _LOOK, size)) for first, size in zip(firsts, (height, width), strict=True)
    )
    found = predictor.resolve(source.read(rows, columns))
    for name, value in found.items():
        if isinstance(value, Tensor):
            say(f"densectx: {source.path}: {name} {value.item():.4g} is estimated from the middle of the picture.")
    return found


def answer(
    predictor: Predictor, source: WindowedFile, options: Options, root: Path, outputs: Mapping[tuple[str, str], str]
) -> dict[str, float]:
    """Write the answers for a picture, by windows; each file appears when all of them are whole.

    Classes are a TIFF with a palette, labels a plane each (255 where a class holds), pictures have the type of the
    input, other numbers are float32 in planes.

    Args:
        predictor: the model.
        source: the picture.
        options: of :func:`options_of`.
        root: the output folder.
        outputs: (task, what follows the stem) -> name below it.

    Returns:
        Seam errors by task, where windows are blended.

    Raises:
        DataError, StorageError, MemoryLimitError, NumericError: no part of a file is left behind.
    """
    groups: dict[str, list[FileSink]] = {key: [] for key in predictor.tasks}
    made: list[FileSink] = []
    shapes = predictor.probe(source.shape[0])
    try:
        for (task, suffix), name in outputs.items():
            made.append(_sink(predictor, source, shapes[task], task, root, name, raw=suffix == ".npy"))
            groups[task].append(made[-1])
        seams = predictor.stream(source, {key: _All(key, sinks) for key, sinks in groups.items()}, options)
        for sink in made:
            sink.finish()
    except BaseException:
        for sink in made:
            sink.abandon()
        raise
    return seams


@final
class _All:
    """Several files of one answer."""

    def __init__(self, task: str, sinks: list[FileSink]) -> None:
        self.task, self.sinks = task, sinks

    def write(self, rows: slice, columns: slice, part: Tensor) -> None:
        """Into each of them."""
        if not part.isfinite().all():
            raise NumericError(f"the answer of {self.task!r} is not finite (NaN or infinity) at row {rows.start}.")
        for sink in self.sinks:
            sink.write(rows, columns, part)


def _sink(
    predictor: Predictor, source: WindowedFile, probe: Sequence[int], key: str, root: Path, name: str, *, raw: bool
) -> FileSink:
    task = predictor.model.task(key)
    channels, height, width = probe[0], source.shape[1] * task.scale, source.shape[2] * task.scale
    info = SourceInfo.from_config(predictor.model.config.get("sources", {}).get(task.source, {}))
    palette: tuple[tuple[int, int, int], ...] = ()
    layout: Layout = "planes"
    dtype: np.dtype[Any] = np.dtype(np.float32)
    convert: Callable[[Tensor], NDArray[Any]] = _plain
    if not raw and task.output == "classes" and channels <= 256:
        layout, channels, dtype, convert = "palette", 1, np.dtype(np.uint8), _ids
        palette = tuple(info.palette) or voc_palette(len(info.classes))
    elif not raw and task.output == "labels":
        dtype, convert = np.dtype(np.uint8), _holds
    elif not raw and task.output in ("restored", "image") and channels in (1, 3):
        keep_gray = task.output == "restored" and source.shape[0] == 1
        channels = 1 if keep_gray else channels
        layout = "rgb" if channels == 3 else "gray"
        if not source.real:
            dtype = np.dtype(np.uint16 if source.deep else np.uint8)
        convert = partial(_levels, keep_gray=keep_gray, white=np.iinfo(dtype).max if dtype.kind == "u" else None)
    return FileSink(root, name, (channels, height, width), dtype, layout, convert, palette)


def _plain(part: Tensor) -> NDArray[Any]:
    return part.numpy()


def _ids(part: Tensor) -> NDArray[Any]:
    return part.argmax(0, keepdim=True).to(torch.uint8).numpy()


def _holds(part: Tensor) -> NDArray[Any]:
    return ((part >= 0.5).to(torch.uint8) * 255).numpy()


def _levels(part: Tensor, *, keep_gray: bool, white: int | None) -> NDArray[Any]:
    if keep_gray and part.shape[0] == 3:
        part = grey(part[None])[0]
    if white is None:
        return part.numpy()
    return (part.clamp(0, 1) * white).round().numpy()
