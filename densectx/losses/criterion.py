"""Weighted sums of losses from a config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from densectx.errors import ConfigError, PluginError
from densectx.losses.base import Countable, Form
from densectx.registry import LOSSES
from densectx.typecheck import fits
from densectx.types import Spec, Terms

_WORDS: dict[Form, str] = {"ids": "class ids", "labels": "labels of 0 or 1", "numbers": "numbers"}


@final
class Criterion(nn.Module):
    """A weighted sum of losses, from a spec or a list of specs with an optional ``weight`` each.

    Args:
        spec: ``"l1"``, ``{"name": "l1", "weight": 0.5}`` or a list of those with different names.
        where: key path for messages.
        form: what the task's target is; losses that are not for it are refused. Null refuses none.
        runtime: arguments that the task supplies to losses that take them.

    Raises:
        ConfigError: no loss, one listed twice, one that is not for the target, a weight that is negative or no number.

    Attributes:
        coefficients: {term: weight in the sum}.
        countable: terms whose weight :meth:`weights` knows.
    """

    def __init__(
        self, spec: Spec | Sequence[Spec], where: str = "loss", *, form: Form | None = None, **runtime: Any
    ) -> None:
        super().__init__()
        runtime["form"] = self.form = form
        specs = [spec] if isinstance(spec, str | Mapping) else list(spec)
        self.terms = nn.ModuleDict()
        self.coefficients: dict[str, float] = {}
        for one in specs:
            options = {"name": one} if isinstance(one, str) else dict(one)
            coefficient: Any = options.pop("weight", 1.0)
            if not fits(coefficient, float) or not 0 <= coefficient < math.inf:
                raise ConfigError(f"expected a finite number of at least 0, got {coefficient!r}.", f"{where}.weight")
            LOSSES.check(options, runtime, where)
            _check_form(str(options["name"]), form, where)
            loss = LOSSES.build(options, where, **runtime)
            name = str(options["name"]).rpartition("/")[2].rpartition(":")[2]
            if name in self.coefficients:
                raise ConfigError(f"{where}: loss {name!r} is listed twice.")
            self.terms[name] = loss
            self.coefficients[name] = float(coefficient)
        if not self.coefficients:
            raise ConfigError(f"{where}: at least one loss is needed.")
        self.countable = frozenset(name for name, loss in self.terms.items() if isinstance(loss, Countable))

    def __call__(self, output: Tensor, target: Tensor) -> Terms:
        """As :meth:`forward`."""
        terms: Terms = super().__call__(output, target)
        return terms

    def forward(self, output: Tensor, target: Tensor) -> Terms:
        """The terms, each (sum, weight), before their coefficients.

        Args:
            output: (B, K, H, W).
            target: as ``form`` says.

        Raises:
            PluginError: labels or numbers of another batch or size than the output, which torch would pair all with
                all; whether channels may differ is up to a loss.
        """
        if self.form in ("labels", "numbers") and _places(output) != _places(target):
            raise PluginError(
                f"loss {', '.join(self.terms)}: the output is {tuple(output.shape)}, the target {tuple(target.shape)};"
                " expected the same B, H and W in both: the head answers and `prepare` of the task makes the target."
            )
        return {name: loss(output, target) for name, loss in self.terms.items()}

    def weights(self, target: Tensor) -> dict[str, Tensor]:
        """The weights that the terms will have for a target, of those that are countable."""
        return {name: loss.weight(target) for name, loss in self.terms.items() if isinstance(loss, Countable)}


def _places(x: Tensor) -> tuple[int, ...]:
    """The shape without channels."""
    return (*x.shape[:1], *x.shape[2:])


def _check_form(name: str, form: Form | None, where: str) -> None:
    takes = _takes(name)
    if form is None or not takes or form in takes:
        return
    own = [entry.name for entry in LOSSES.entries() if entry.distribution == "densectx"]
    fit = [one for one in own if form in _takes(one)]
    raise ConfigError(
        f"loss {name!r} is for {' or '.join(_WORDS[one] for one in takes)}, but the target of this task is"
        f" {_WORDS[form]}; take {', '.join(fit)}.",
        where,
    )


def _takes(name: str) -> tuple[Form, ...]:
    takes: tuple[Form, ...] = getattr(LOSSES.get(name), "takes", ())
    return takes
