"""Which sources a step takes: shares, evenness, positions counted from the step alone."""

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densectx.data.sampling import make_sampling
from densectx.data.streams import StepSampler
from densectx.errors import ConfigError

LENGTHS = {"a": 400, "b": 100, "c": 7}

ratios = st.fixed_dictionaries({key: st.integers(1, 9) for key in LENGTHS}).map(
    lambda r: {"name": "ratio", "ratios": r}
)
temperatures = st.floats(0.5, 50).map(lambda t: {"name": "temperature", "temperature": t})
cycles = st.one_of(st.sampled_from(["joint", "alternate"]), ratios, temperatures)


@st.composite
def schedules(draw):
    phases = draw(st.lists(cycles, min_size=1, max_size=3))
    ends = sorted(draw(st.sets(st.integers(1, 60), min_size=len(phases) - 1, max_size=len(phases) - 1)))
    named = [{"name": one} if isinstance(one, str) else dict(one) for one in phases]
    return [{**one, "until": end} for one, end in zip(named, ends, strict=False)] + [named[-1]]


@settings(max_examples=30, deadline=None)
@given(spec=st.one_of(cycles, schedules()))
def test_own_steps_are_counted_without_gaps(spec):
    """However a step chooses: a source's k-th step is its position k, wherever the counting starts."""
    sampling, seen = make_sampling(spec, LENGTHS), Counter()
    for step in range(90):
        chosen = sampling.chosen(step)
        assert chosen
        assert chosen == {source: seen[source] for source in chosen}
        assert make_sampling(spec, LENGTHS).chosen(step) == chosen
        seen.update(list(chosen))
    far = 10**12 + 7
    assert all(0 <= own <= far for own in sampling.chosen(far).values())


@settings(max_examples=40, deadline=None)
@given(spec=ratios, start=st.integers(0, 1000))
def test_ratios_hold_in_every_cycle_and_sources_are_spread(spec, start):
    sampling, times = make_sampling(spec, LENGTHS), spec["ratios"]
    period = sum(times.values())
    taken = [next(iter(sampling.chosen(step))) for step in range(start, start + period)]
    assert Counter(taken) == times
    for count in range(period):  # never more than a step or so away from its share
        assert all(abs(taken[:count].count(s) - n * count / period) < 3 for s, n in times.items())


@pytest.mark.parametrize("temperature", [0.01, 1e-6])
def test_low_temperatures_leave_the_longest_source(temperature):
    sampling = make_sampling({"name": "temperature", "temperature": temperature}, LENGTHS)
    taken = Counter(source for step in range(1002) for source in sampling.chosen(step))
    assert taken == {"a": 1000, "b": 1, "c": 1}  # every source is shown


@pytest.mark.parametrize("temperature", [1, 2, 5, float("inf")])
def test_temperature_makes_shares_even(temperature):
    sampling = make_sampling({"name": "temperature", "temperature": temperature}, LENGTHS)
    taken = Counter(next(iter(sampling.chosen(step))) for step in range(3000))
    raw = {source: length ** (1 / temperature) for source, length in LENGTHS.items()}
    for source, value in raw.items():
        assert taken[source] / 3000 == pytest.approx(value / sum(raw.values()), abs=2e-3)


@settings(max_examples=8, deadline=None)
@given(spec=schedules(), world=st.integers(1, 3), start=st.integers(0, 50))
def test_resume_and_ranks(spec, world, start):
    """The samples of a step are the same from any start, and shared out without gaps or repetition."""

    def sampler(rank, first, size=2):
        sizes = dict.fromkeys(LENGTHS, size)
        options = {"sampling": spec, "seed": 3, "steps": 20}
        return StepSampler(LENGTHS, sizes, world=world, rank=rank, start=lambda: first, **options)

    whole = [list(sampler(rank, 0)) for rank in range(world)]
    if start < 20:
        assert [next(iter(sampler(rank, start))) for rank in range(world)] == [one[start] for one in whole]
    items = [item for rank, step in product(range(world), range(20)) for item in whole[rank][step]]
    assert len(set(items)) == len(items), "no sample twice in a pass"


def test_an_epoch_shows_every_source_once():
    batches = {"a": 100, "b": 25, "c": 2}
    sampling = {"name": "ratio", "ratios": {"a": 2, "b": 1, "c": 1}}
    assert make_sampling("joint", LENGTHS).steps(batches) == 100
    assert make_sampling("alternate", LENGTHS).steps(batches) == 300
    assert make_sampling(sampling, LENGTHS).steps(batches) == 200
    assert make_sampling([{"name": "joint", "until": 3}, sampling], LENGTHS).steps(batches) == 200


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("joined", "data.sampling: expected joint or alternate, got 'joined'; did you mean 'joint'?"),
        ({"name": "ratios"}, "unknown sampling 'ratios'; did you mean 'ratio'?"),
        ({"name": "ratio"}, "data.sampling: ratio needs ratios."),
        ({"name": "ratio", "ratios": {"a": 1, "b": 1, "d": 1}}, "data.sampling.ratios: unknown source 'd'"),
        ({"name": "ratio", "ratios": {"a": 1, "b": 1}}, "source 'c' has no ratio"),
        ({"name": "ratio", "ratios": {"a": 1, "b": 1, "c": 0.5}}, "c: expected a whole number of 1 to 1000, got 0.5"),
        ({"name": "temperature", "temperature": 0}, "expected a positive number, got 0"),
        ({"name": "temperature", "temprature": 2}, "did you mean 'temperature'?"),
        ({"name": "joint", "ratios": {}}, "data.sampling (joint): unknown option 'ratios'"),
        (7, "expected a name, {name: ...} or a list of phases, got 7"),
        ([], "the list of phases is empty"),
        (["joint", "alternate"], "data.sampling[0]: until: expected a whole number above 0, got None"),
        ([{"name": "joint", "until": 5}, {"name": "joint", "until": 5}, "joint"], "above 5, got 5"),
        ([{"name": "joint", "until": 5}], "it has no until"),
    ],
)
def test_what_cannot_work_is_refused(spec, message):
    with pytest.raises(ConfigError) as error:
        make_sampling(spec, LENGTHS)
    assert message in str(error.value)
