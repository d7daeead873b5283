"""From a file of published weights to a model file, with a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from densectx.checkpoint import header
from densectx.published import from_caffe, from_drn, from_vgg
from densectx.published.plan import Plan
from densectx.published.stream import write_safetensors

PLANS: Final[Mapping[str, Callable[[Path, str | None], AbstractContextManager[Plan]]]] = {
    "caffe": from_caffe.plan,
    "drn": from_drn.plan,
    "vgg": from_vgg.plan,
}


def convert(kind: str, path: Path, net: str | None, out: Path) -> Iterator[str]:
    """Convert a file; memory of about its largest tensor for Caffe and mapped files.

    Args:
        kind: ``caffe``, ``drn`` or ``vgg``.
        path: the published weights.
        net: registered model to fill, None for the one that fits.
        out: the ``.safetensors`` file, replaced if it exists.

    Yields:
        Lines of the report; the last one when the file is there.

    Raises:
        ConfigError: unknown net, or one that such a file cannot fill.
        CheckpointError: damaged file, or one that does not fit.
        StorageError: it cannot be written.
    """
    with PLANS[kind](path, net) as plan:
        model = plan.net.model
        yield f"net: {plan.net.name}"
        yield f"taken: {', '.join(plan.names)}"
        if plan.fresh:
            yield f"fresh: {', '.join(_layers(plan.fresh))} (initialised as the net starts)"
        if plan.left:
            yield f"left over: {', '.join(plan.left)}"
        yield from (f"note: {note}" for note in plan.notes)
        write_safetensors(out, header(model), model.state_dict(), plan.taken, path)
    count = sum(parameter.numel() for parameter in model.parameters())
    yield f"{out}: {count:,} parameters, {out.stat().st_size / 1e6:,.0f} MB"


def _layers(keys: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
