"""Methods by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from densectx.balancing.balancer import Balancer
from densectx.balancing.base import Balancing
from densectx.balancing.by_gradient import IMTLG, MGDA, GradNorm, NashMTL, PCGrad, UPGrad
from densectx.balancing.by_loss import DWA, FAMO, Fixed, Uncertainty
from densectx.balancing.gram import OF
from densectx.errors import ConfigError, unknown
from densectx.model import DenseModel
from densectx.typecheck import describe, fits
from densectx.types import Spec

METHODS: Final[Mapping[str, type[Balancing]]] = {
    "dwa": DWA,
    "famo": FAMO,
    "fixed": Fixed,
    "gradnorm": GradNorm,
    "imtl_g": IMTLG,
    "mgda": MGDA,
    "nash_mtl": NashMTL,
    "pcgrad": PCGrad,
    "uncertainty": Uncertainty,
    "upgrad": UPGrad,
}


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
    """
    where = "model.balancing"
    if not isinstance(spec, str | Mapping) or (isinstance(spec, Mapping) and not isinstance(spec.get("name"), str)):
        raise ConfigError(f"expected a name or a mapping with 'name', got {spec!r}.", where)
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name")
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS), where)
    method = METHODS[name]
    signature = inspect.signature(method, eval_str=True).parameters
    own = {key: signature[key].annotation for key in signature if key != "tasks"}
    shared = {"watch": bool, "of": str}
    for key, value in options.items():
        kind = own.get(key, shared.get(key))
        if kind is None:
            raise ConfigError(unknown("option", key, [*own, *shared]), f"{where} ({name})")
        if not fits(value, kind):
            raise ConfigError(f"{key}: expected {describe(kind)}, got {value!r}.", where)
    if "of" in options and method.needs == "losses" and not options.get("watch"):
        raise ConfigError(f"of: {name} looks at no gradients; add watch: true to have them measured.", where)
    watch, of = options.pop("watch", False), options.pop("of", "weights")
    if of not in OF:
        raise ConfigError(unknown("proxy", of, OF), f"{where}.of")
    try:
        return Balancer(method(list(model.tasks), **options), model, seed, of=of, watch=watch)
    except ConfigError as error:
        raise error if error.path else ConfigError(f"{name}: {error.message}", where) from None
