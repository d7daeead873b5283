"""Which sources a training step takes, counted from the step alone: the same on every rank, nothing to store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, isfinite
from typing import Any, Final, NamedTuple, final

from densectx.errors import ConfigError, suggest, unknown

NAMES: Final = ("joint", "alternate", "ratio", "temperature")
_PLAIN: Final = ("joint", "alternate")
_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {"ratio": ("ratios",), "temperature": ("temperature",)}
_PERIOD: Final = 1000  # steps after which the shares of `temperature` repeat, to the nearest step


@final
class Cycle:
    """Places that repeat for ever: step k takes the sources of place k mod P.

    Args:
        places: P sets of sources.
    """

    def __init__(self, places: Sequence[Sequence[str]]) -> None:
        self.places = [tuple(place) for place in places]
        self._before: list[dict[str, int]] = []  # how often each source came before a place
        self._all: dict[str, int] = {}
        for place in self.places:
            self._before.append(dict(self._all))
            for source in place:
                self._all[source] = self._all.get(source, 0) + 1

    def count(self, step: int, source: str) -> int:
        """How many of the steps 0 ... step - 1 take a source."""
        turns, place = divmod(step, len(self.places))
        return turns * self._all.get(source, 0) + self._before[place].get(source, 0)

    def sources(self, step: int) -> tuple[str, ...]:
        """Of a step."""
        return self.places[step % len(self.places)]

    def steps(self, batches: Mapping[str, int]) -> int:
        """As many as show each source once at least: {source: its batches} -> steps."""
        return max(ceil(batches[source] * len(self.places) / times) for source, times in self._all.items())


@final
class _Phase(NamedTuple):
    start: int
    cycle: Cycle


@final
class Sampling:
    """Phases of a run, each a cycle of its own.

    Args:
        phases: (first step, cycle), rising from step 0.
    """

    def __init__(self, phases: Sequence[tuple[int, Cycle]]) -> None:
        self._phases = [_Phase(*phase) for phase in phases]

    def chosen(self, step: int) -> dict[str, int]:
        """{source that a step takes: how many steps before took it}."""
        now = next(phase for phase in reversed(self._phases) if phase.start <= step)
        return {source: self.count(step, source) for source in now.cycle.sources(step - now.start)}

    def together(self) -> set[tuple[str, ...]]:
        """The sources that a step may take, of every phase."""
        return {place for phase in self._phases for place in phase.cycle.places}

    def steps(self, batches: Mapping[str, int]) -> int:
        """As many as show each source of the last phase once at least."""
        return self._phases[-1].cycle.steps(batches)

    def count(self, step: int, source: str) -> int:
        """How many of the steps 0 ... step - 1 take a source."""
        ends = [phase.start for phase in self._phases[1:]] + [step]
        return sum(
            phase.cycle.count(min(end, step) - phase.start, source)
            for phase, end in zip(self._phases, ends, strict=True)
            if phase.start < step
        )


def check_sampling(spec: Any, sources: Sequence[str], where: str = "data.sampling") -> None:
    """Refuse a ``data.sampling`` that cannot work, before any file is read.

    Raises:
        ConfigError: with the key path.
    """
    make_sampling(spec, dict.fromkeys(sources, 1), where)


def make_sampling(spec: Any, lengths: Mapping[str, int], where: str = "data.sampling") -> Sampling:
    """From the config.

    Args:
        spec: ``joint`` (every source at every step), ``alternate`` (one a step, in turn), ``{name: ratio, ratios: {a:
            2, b: 1}}`` (one a step, so often in a + b + ... steps, spread evenly), ``{name: temperature, temperature:
            T}`` (one a step, with a share of n^(1 / T), n samples: 1 as the data are, large is even), or a list of
            these with ``until`` (training batches after which the next one begins) in all but the last.
        lengths: samples a source.
        where: key path for messages.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(spec, list | tuple):
        return Sampling([(0, _cycle(spec, lengths, where))])
    phases: list[tuple[int, Cycle]] = []
    start: int = 0
    for index, one in enumerate(spec):
        at = f"{where}[{index}]"
        options: dict[str, Any] = (
            {"name": one} if isinstance(one, str) else dict(one) if isinstance(one, Mapping) else {}
        )
        until, last = options.pop("until", None), index == len(spec) - 1
        phases.append((start, _cycle(options or one, lengths, at)))
        if last and until is not None:
            raise ConfigError("the last phase goes on to the end; it has no until.", at)
        if not last and (not isinstance(until, int) or isinstance(until, bool) or until <= start):
            raise ConfigError(f"until: expected a whole number above {start}, got {until!r}.", at)
        start = start if last else until
    if not phases:
        raise ConfigError("the list of phases is empty.", where)
    return Sampling(phases)


def _cycle(spec: Any, lengths: Mapping[str, int], where: str) -> Cycle:
    sources = list(lengths)
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    if isinstance(spec, Mapping) and len(spec) == 1 and name in _PLAIN:
        spec = name
    if isinstance(spec, str) and spec not in _PLAIN and spec not in _OPTIONS:
        raise ConfigError(f"expected {' or '.join(_PLAIN)}, got {spec!r}{suggest(spec, _PLAIN)}", where)
    if spec == "joint":
        return Cycle([sources])
    if spec == "alternate":
        return Cycle([[source] for source in sources])
    if isinstance(name, str) and name not in NAMES:
        raise ConfigError(unknown("sampling", name, NAMES), where)
    if not isinstance(spec, Mapping) or not isinstance(name, str):
        raise ConfigError(f"expected a name, {{name: ...}} or a list of phases, got {spec!r}.", where)
    allowed = _OPTIONS.get(name, ())
    for key in spec:
        if key not in ("name", *allowed):
            raise ConfigError(unknown("option", str(key), allowed), f"{where} ({name})")
    for key in allowed:
        if key not in spec:
            raise ConfigError(f"{name} needs {key}.", where)
    if name == "ratio":
        return Cycle([[source] for source in _spread(_ratios(spec["ratios"], sources, f"{where}.ratios"))])
    temperature = spec["temperature"]
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or not temperature > 0:
        raise ConfigError(f"temperature: expected a positive number, got {temperature!r}.", where)
    power = 1 / temperature if isfinite(temperature) else 0.0
    most = max(1, *lengths.values())  # powers of shares, which overflow at no temperature
    raw = {source: (max(length, 1) / most) ** power for source, length in lengths.items()}
    total = sum(raw.values())
    return Cycle([[s] for s in _spread({s: max(1, round(_PERIOD * value / total)) for s, value in raw.items()})])


def _ratios(given: Any, sources: Sequence[str], where: str) -> dict[str, int]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"expected {{source: whole number}}, got {given!r}.", where)
    for key, value in given.items():
        if key not in sources:
            raise ConfigError(unknown("source", str(key), sources), where)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _PERIOD:
            raise ConfigError(f"{key}: expected a whole number of 1 to {_PERIOD}, got {value!r}.", where)
    for source in sources:
        if source not in given:
            raise ConfigError(f"source {source!r} has no ratio.", where)
    return {source: given[source] for source in sources}


def _spread(times: Mapping[str, int]) -> list[str]:
    """Each source so often, as evenly as can be."""
    order = [((2 * i + 1) / (2 * n), source) for source, n in times.items() for i in range(n)]
    return [source for _, source in sorted(order, key=lambda item: item[0])]
