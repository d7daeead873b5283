"""Weights by name: put into a model strictly, or what does not fit said on one screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from densectx.errors import CheckpointError
from densectx.nn.norm import spread

_LISTED = 5  # keys of a kind that a refusal lists


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Load weights strictly.

    Raises:
        CheckpointError: missing, unexpected or differently shaped tensors, grouped.
    """
    own = module.state_dict()
    if any(k not in weights for k in own) and own.keys() <= spread(module, weights).keys():
        raise CheckpointError(
            f"{path}: its norm layers are not those of this model, which has a copy for each kind of input"
            " (model.norm: per_input); start from the file with init_from, which fills the copies."
        )
    if said := _unfit(own, weights):
        raise CheckpointError("\n".join([f"{path}: the weights do not fit the model:", *said]))
    module.load_state_dict(dict(weights))


def _unfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What does not fit, at most 18 lines: keys by the part that they belong to, shapes one by one."""
    lines = []
    for kind, keys in (("missing", own.keys() - weights.keys()), ("unexpected", weights.keys() - own.keys())):
        if keys:
            parts = Counter(_part(key) if len(keys) > _LISTED else key for key in keys)
            named = [f"    {part}" + (f" ({n} tensors)" if n > 1 else "") for part, n in sorted(parts.items())]
            lines += [f"  {len(keys)} {kind}:", *_first(named)]
    shapes = [
        f"    {key}: {tuple(weights[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in weights and own[key].shape != weights[key].shape
    ]
    return [*lines, f"  {len(shapes)} of another shape:", *_first(shapes)] if shapes else lines


def _first(lines: list[str]) -> list[str]:
    shown = lines[:_LISTED]
    return shown if len(lines) <= _LISTED else [*shown[:-1], f"    and {len(lines) - _LISTED + 1} more"]


def parts_of(keys: Iterable[str]) -> list[str]:
    """The parts of a model that keys belong to: three names of a task, one of the rest."""
    return sorted({_part(key) for key in keys})


def _part(key: str) -> str:
    return ".".join(key.split(".")[: 3 if key.startswith("tasks.") else 1])
