"""Which checkpoint a run goes on from, and whether its config is still the one it began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from densectx.archive import damage
from densectx.checkpoint_files import newest_first, step_of
from densectx.errors import CheckpointError, ConfigError
from densectx.say import warn

_SHOWN = 16  # changed keys, so that a message stays on one screen


def newest_whole(run: Path) -> Path:
    """The checkpoint of a run to go on from; damaged ones are passed over loudly.

    Args:
        run: its folder.

    Raises:
        CheckpointError: it has none that is whole.
    """
    files = newest_first(run / "checkpoints")
    refused: list[Path] = []
    for file in files:
        if not (reason := damage(file)):
            if refused:
                lost = max(map(step_of, refused)) - step_of(file)
                again = f"{lost} optimizer steps are done again" if lost > 0 else "nothing later is whole"
                warn(f"going on from {file}, the newest that is whole: {again}.")
            return file
        refused.append(file)
        warn(f"{file} cannot be used: {reason}")
    have = f"none of its {len(files)} checkpoints is whole" if files else "it has no checkpoint"
    raise CheckpointError(
        f"{run}: {have}, so there is nothing to go on from; leave --resume out for a fresh run, or start from other"
        " weights with init_from."
    )


def refuse_changes(source: str, old: Mapping[str, Any], new: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """See that the config is that of the run.

    Args:
        source: what ``--resume`` was given.
        old: config in the checkpoint.
        new: the composed one.
        allowed: key paths below which it may differ.

    Raises:
        ConfigError: it differs elsewhere; each key with its old and its new value.
    """
    changed = [c for c in differences(old, new) if not any(c[0].startswith(a) for a in allowed)]
    if not changed:
        return
    lines = [f"  {key}: {_said(a)} -> {_said(b)}" for key, a, b in changed[:_SHOWN]]
    if len(changed) > _SHOWN:
        lines.append(f"  and {len(changed) - _SHOWN} more")
    raise ConfigError(
        "\n".join(
            [
                f"--resume {source}: the config differs from the run's (its value -> the one given now):",
                *lines,
                f"Resume with the run's own config, or say --allow-changed {changed[0][0]} if it is meant.",
            ]
        )
    )


_ABSENT = object()


@final
class _Order(tuple[str, ...]):
    """Names whose order matters."""

    def __repr__(self) -> str:
        return ", ".join(self)


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key paths whose values differ, with both."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if path == "model.tasks" and old.keys() == new.keys() and [*old] != [*new]:
            yield path, _Order(old), _Order(new)  # what an optimizer knows of a parameter is stored by its place
        for key in sorted({*old, *new}, key=str):
            below = f"{path}.{key}" if path else str(key)
            yield from differences(old.get(key, _ABSENT), new.get(key, _ABSENT), below)
    elif old != new:
        yield path, old, new


def _said(value: Any) -> str:
    text = "(not there)" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
