"""Times of things that are compared: in turns, in one process, with the same threads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from densectx.precision import native_precision

LEAST = 3  # rounds, whatever they take


@final
@dataclass(frozen=True)
class Plan:
    """How a run measures.

    Attributes:
        quick: tiny sizes, to see that everything works; its figures mean nothing.
        repeats: rounds of each comparison.
        budget: seconds after which a comparison ends early, with :data:`LEAST` rounds at least.
        threads: of torch, here and in processes that are started.
        dtypes: ``bf16`` (autocast) and ``fp32``.
        configs: by part: YAML file, checkpoint or name of ``densectx list models``.
        singles: as many networks of one task as the multi-task config has, if it is compared with such.
    """

    quick: bool
    repeats: int
    budget: float
    threads: int
    dtypes: tuple[str, ...]
    configs: Mapping[str, str]
    singles: tuple[str, ...] = ()

    @property
    def native(self) -> str:
        """What ``trainer.precision: auto`` would take, if it is among the asked ones."""
        native = "bf16" if native_precision("cpu") == "bf16-mixed" else "fp32"
        return native if native in self.dtypes else self.dtypes[0]


@final
@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
        name: unique in the comparison.
        run: does it once.
        facts: what else is known: ``macs``, ``parameters``, ``pixels``.
    """

    name: str
    run: Callable[[], object]
    facts: Mapping[str, Any] = field(default_factory=dict)


def measure(arms: Sequence[Arm], plan: Plan, warm: int = 1) -> dict[str, dict[str, Any]]:
    """Every arm once a round, forwards and backwards in turn, so that a drift of the machine meets all alike.

    Returns:
        {arm: facts, ``times_s`` in the order of the rounds, ``median_s``}.
    """
    for _ in range(warm):
        for arm in arms:
            arm.run()
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    began = time.perf_counter()
    for round_ in range(plan.repeats):
        if round_ >= LEAST and time.perf_counter() - began > plan.budget:
            break
        for arm in arms if round_ % 2 == 0 else reversed(arms):
            start = time.perf_counter()
            arm.run()
            times[arm.name].append(time.perf_counter() - start)
    return {arm.name: {**arm.facts, **told(times[arm.name])} for arm in arms}


def told(times: Sequence[float]) -> dict[str, Any]:
    """Times of an arm for the file: to a microsecond, and the median of what is written."""
    kept = [round(seconds, 6) for seconds in times]
    return {"times_s": kept, "median_s": statistics.median(kept)}


def compare(what: str, arms: Sequence[Arm], plan: Plan, **more: Any) -> dict[str, Any]:
    """The first arm against each other one."""
    return {"what": what, **more, **compared(measure(arms, plan))}


def compared(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Measured arms with their ratios, see :func:`ratios`."""
    return {"arms": arms, "ratios": ratios(arms)}


def ratios(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """First arm / each other one, of the medians, and of the multiply-adds where both are known.

    ``time_by_macs`` is the ratio of the ratios: up to 1 the first is as fast as its multiply-adds allow.
    """
    (_, ours), *others = arms.items()
    found = {}
    for name, other in others:
        row = {"time": ours["median_s"] / other["median_s"]}
        if "macs" in ours and "macs" in other:
            row["macs"] = ours["macs"] / other["macs"]
            row["time_by_macs"] = row["time"] / row["macs"]
        found[name] = row
    return found
