"""Which checkpoint a run goes on from, and whether its config is still the one it began with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from densectx.archive import damage
from densectx.checkpoint_files import newest_first, step_of
from densectx.errors import CheckpointError, ConfigError, suggest
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


def refuse_changes(
    source: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    allowed: Sequence[str],
    others: Iterable[str] = (),
) -> list[str]:
    """See that the config is that of the run.

    Args:
        source: what ``--resume`` was given.
        old: config in the checkpoint.
        new: the composed one.
        allowed: key paths at and below which it may differ.
        others: key paths that may be allowed though neither config has them.

    Returns:
        The key paths where it differs, which all are allowed.

    Raises:
        ConfigError: it differs elsewhere, each key with its old and its new value; or in what the states of the
            checkpoint belong to, which nothing allows; or an allowed key is none.
    """
    known = {*others, *_key_paths(old), *_key_paths(new)}
    if strange := [key for key in allowed if key not in known]:
        raise ConfigError(
            f"--allow-changed {strange[0]}: neither the run's config nor the one given now has that"
            f"{suggest(strange[0], known)}"
        )
    found = list(differences(old, new))
    if changed := [c for c in found if not any(_below(c[0], a) for a in allowed)]:
        lines = [f"  {key}: {_said(a)} -> {_said(b)}" for key, a, b in changed[:_SHOWN]]
        if len(changed) > _SHOWN:
            lines.append(f"  and {len(changed) - _SHOWN} more")
        keys = [key if len(changed) <= _SHOWN else key.partition(".")[0] for key, _, _ in changed]
        meant = " ".join(f"--allow-changed {key}" for key in dict.fromkeys(keys))
        raise ConfigError(
            "\n".join(
                [
                    f"--resume {source}: the config differs from the run's (its value -> the one given now):",
                    *lines,
                    f"Resume with the run's own config, or say {meant} if it is meant.",
                ]
            )
        )
    for key, before, now in found:
        if _is_of_states(key, before, now):
            raise ConfigError(
                f"--resume {source}: {key}: {_said(before)} -> {_said(now)} cannot change in a run that goes on: what"
                " its checkpoint remembers belongs to the old one. Start a new run from its weights: --init_from RUN."
            )
    return [key for key, _, _ in found]


_ABSENT = object()
_ORDERED = ("model.tasks", "data.sources")
"""What an optimizer knows of a parameter is stored by its place; sources take turns in their order."""


@final
class _Order(tuple[str, ...]):
    """Names whose order matters."""

    def __repr__(self) -> str:
        return ", ".join(self)


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key paths whose values differ, with both."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if path in _ORDERED and old.keys() == new.keys() and [*old] != [*new]:
            yield path, _Order(old), _Order(new)
        for key in sorted({*old, *new}, key=str):
            below = f"{path}.{key}" if path else str(key)
            yield from differences(old.get(key, _ABSENT), new.get(key, _ABSENT), below)
    elif old != new:
        yield path, old, new


def _key_paths(node: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Every dotted key path of a config."""
    for key, value in node.items():
        below = f"{path}.{key}" if path else str(key)
        yield below
        if isinstance(value, Mapping):
            yield from _key_paths(value, below)


def _is_of_states(key: str, before: Any, now: Any) -> bool:
    """Whether a change leaves no use for the states of optimizer, schedule or balancing; options of them may change."""
    if key in ("model.optimizer", "model.lr_scheduler"):
        return True  # one of the two is none
    if isinstance(before, _Order) and key == "model.tasks":
        return True  # the states of one task would be those of another
    if key == "model.param_groups":
        return _patterns(before) != _patterns(now)
    if key == "model.balancing":
        return bool(_method(before) != _method(now))
    states = ("model.optimizer.class_path", "model.lr_scheduler.class_path", "model.balancing.name", "model.freeze")
    return any(_below(key, one) for one in states)


def _patterns(groups: Any) -> list[Any]:
    return [group.get("match") for group in groups] if isinstance(groups, list) else []


def _method(balancing: Any) -> Any:
    if balancing is _ABSENT or balancing is None:
        return "fixed"
    return balancing.get("name") if isinstance(balancing, Mapping) else balancing


def _below(key: str, path: str) -> bool:
    return key == path or key.startswith((f"{path}.", f"{path}["))


def _said(value: Any) -> str:
    text = "(not there)" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
