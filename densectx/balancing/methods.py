"""Methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from densectx.balancing.balancer import Balancer
from densectx.balancing.base import Balancing
from densectx.balancing.gram import OF
from densectx.errors import ConfigError, unknown
from densectx.model import DenseModel
from densectx.registry import BALANCING
from densectx.types import Spec

WHERE = "model.balancing"
SHARED = ("watch", "of")
"""Options that every method takes beside its own."""


def make_balancer(spec: Spec, model: DenseModel, seed: int) -> Balancer:
    """The method of ``model.balancing``, for a model.

    Args:
        spec: ``pcgrad`` or ``{name: gradnorm, alpha: 1.5}``; beside its own options a method takes ``watch: true``
            (measure and log how gradients agree at the steps that are logged) and, where gradients are measured,
            ``of: weights | features``.
        model: whose frozen parts are frozen already.
        seed: of the run.

    Raises:
        ConfigError: unknown name or option, an option that does not fit, or gradients of nothing shared.
        PluginError: a method of another package cannot be used.
    """
    given: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {}
    own = {key: value for key, value in given.items() if key not in SHARED} if given else spec
    method: Balancing = BALANCING.build(own, WHERE, also=SHARED, tasks=list(model.tasks))
    watch, of = given.get("watch", False), given.get("of", "weights")
    if not isinstance(watch, bool):
        raise ConfigError(f"expected true or false, got {watch!r}.", f"{WHERE}.watch")
    if of not in OF:
        raise ConfigError(unknown("proxy", str(of), OF), f"{WHERE}.of")
    if "of" in given and method.needs == "losses" and not watch:
        raise ConfigError("the method looks at no gradients; add watch: true to have them measured.", f"{WHERE}.of")
    try:
        return Balancer(method, model, seed, of=of, watch=watch)
    except ConfigError as error:
        raise error if error.path else error.within(WHERE) from None
