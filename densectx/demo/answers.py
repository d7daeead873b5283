"""From the bytes of a picture to what the page shows: pictures, classes, numbers and files to keep."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from time import perf_counter
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from densectx.demo.store import Store, Stored
from densectx.demo.uploads import Uploads
from densectx.demo.views import levels, png, view
from densectx.inference.predictor import Predictor
from densectx.inference.writers import Answer, encoders, raw_npy
from densectx.model import DenseModel
from densectx.types import SourceInfo

Step: TypeAlias = Callable[[str, float], None]
"""(what is done, share of the work done): may raise to end it."""

RAW_BYTES: Final = 128 << 20
"""Answers of more bytes are not kept as numbers."""

_READ, _RUN = 0.05, 0.85  # shares of the work after reading and after the network, as a rule
_PROBE: Final = 16  # pixels
_KINDS: Final = {".png": "image/png", ".tif": "image/tiff", ".npy": "application/octet-stream"}


@final
class Answering:
    """A model with what is needed to answer for pictures of the page.

    Args:
        model: the model.
        device: where it runs, from the first picture on.
        uploads: reads the pictures.
        store: keeps the files.
    """

    def __init__(self, model: DenseModel, device: torch.device, uploads: Uploads, store: Store) -> None:
        self.model, self.device, self.uploads, self.store = model, device, uploads, store
        self._last: tuple[Any, Predictor, list[float]] | None = None

    def __call__(
        self, content: bytes, tasks: Sequence[str], options: Mapping[str, float], step: Step
    ) -> dict[str, Any]:
        """Answer.

        Args:
            content: the file.
            tasks: keys.
            options: run-time options that were given.
            step: is told how far the work is.

        Returns:
            ``{input: {width, height, gray, url}, seconds, results: [{task, output, width, height, files, ...}]}``.

        Raises:
            DensectxError: the picture cannot be read, does not fit the model, or the answer is not finite.
        """
        step("Reading the picture", 0.0)
        image, deep, real = self.uploads.read(content)
        predictor, costs = self._prepared(tuple(tasks), dict(options), len(image))
        resolved = predictor.resolve(image)
        began = perf_counter()
        with _followed(self.model, costs, step):
            answers = predictor(image, resolved)
        seconds = perf_counter() - began
        files: list[Stored] = [Stored("image/png", png(levels(image)))]
        results = []
        for number, (key, value) in enumerate(answers.items()):
            step("Drawing", _RUN + (1 - _RUN) * number / len(answers))
            estimated = {
                name.partition(".")[2]: found.item()
                for name, found in resolved.items()
                if isinstance(found, Tensor) and name.startswith(f"{key}.")
            }
            results.append({**self._result(key, Answer(image, deep, value), real, files), "estimated": estimated})
        token = self.store.add(files)
        for result in results:
            for file in [*result["files"], *result["view"].values()]:
                if isinstance(file, dict) and "number" in file:
                    file["url"] = f"/api/results/{token}/{file.pop('number')}"
        height, width = image.shape[1:]
        shown = {"width": width, "height": height, "gray": len(image) == 1, "url": f"/api/results/{token}/0"}
        return {"input": shown, "seconds": seconds, "results": results}

    def _prepared(
        self, tasks: tuple[str, ...], options: dict[str, float], channels: int
    ) -> tuple[Predictor, list[float]]:
        """What answers, and the share of the work done after each layer; both kept for the next picture."""
        asked = (tasks, options, channels)
        if self._last is None or self._last[0] != asked:
            predictor = Predictor(self.model, tasks, options, self.device, "32")
            small = torch.full((channels, _PROBE, _PROBE), 0.5)
            costs = _costs(self.model, lambda: self.model.predict(small, tasks, options))
            self._last = asked, predictor, costs
        return self._last[1:]

    def _result(self, key: str, answer: Answer, real: bool, files: list[Stored]) -> dict[str, Any]:
        """What the page is told of one answer; its files are added to ``files``."""
        task, value = self.model.task(key), answer.value
        info = SourceInfo.from_config(self.model.config.get("sources", {}).get(task.source, {}))

        def add(content: bytes, kind: str, encoding: str = "") -> dict[str, Any]:
            files.append(Stored(kind, content, encoding))
            return {"number": len(files) - 1, "size": len(content)}

        kept: list[dict[str, Any]] = []
        for suffix, encode in encoders(task, info, value.shape, raw=False, real=real).items():
            kept.append({"name": key + suffix, **add(encode(answer), _KINDS[suffix[suffix.rindex(".") :]])})
        if value.numel() * 4 <= RAW_BYTES:
            kept.append({"name": f"{key}.npy", **add(raw_npy(answer), _KINDS[".npy"])})
        shown = view(task.output, value, info, gray=len(answer.image) == 1)
        if shown.pixels is not None:
            same = task.output != "values" and not answer.deep and kept and kept[0]["name"].endswith(".png")
            image = {key: kept[0][key] for key in ("number", "size")} if same else add(png(shown.pixels), "image/png")
            shown.about["image"] = image
        if shown.cells is not None:
            packed = zlib.compress(np.ascontiguousarray(shown.cells).tobytes(), 1)
            shown.about["cells"] = add(packed, "application/octet-stream", "deflate")
        height, width = value.shape[1:]
        about = {"task": key, "output": task.output, "width": width, "height": height, "channels": len(value)}
        return {**about, "view": shown.about, "files": kept}


def _costs(model: nn.Module, run: Callable[[], object]) -> list[float]:
    """Share of the work done after each layer that runs, from a pass on a small picture."""
    spent: list[float] = []

    def count(module: nn.Module, _: Any, output: Any) -> None:
        numbers = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        spent.append(float(numbers * prod(output.shape[2:])) if isinstance(output, Tensor) else 0.0)

    with _hooked(model, count):
        run()
    total = sum(spent) or 1.0
    return [float(share) for share in np.cumsum(spent) / total]


@contextmanager
def _followed(model: nn.Module, costs: Sequence[float], step: Step) -> Iterator[None]:
    """Tell ``step`` of every layer; it may raise in the middle of a pass. A picture in tiles is several passes."""
    done = 0

    def tell(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal done
        part, place = divmod(done, len(costs))
        done += 1
        words = f"Running the network, part {part + 1}" if part else "Running the network"
        step(words, _READ + (_RUN - _READ) * costs[place])

    step("Running the network", _READ)
    with _hooked(model, tell):
        yield


@contextmanager
def _hooked(model: nn.Module, hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in model.modules() if not list(module.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
