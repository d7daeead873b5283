"""Connected taps, path counts and gridding of dilated stacks, against enumeration of paths and real convolutions."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.inspection.coverage import coverage, gridding, path_counts, suggest_dilations
from densectx.nn import ContextModule

STACKS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("dilations", "connected", "field"),
    [
        ((1, 3, 9), 27, 27),
        ((1, 2, 4), 15, 15),
        ((1, 2, 5), 17, 17),
        ((1, 4, 16), 27, 43),
        ((2, 2, 2), 7, 13),
        ((2, 4, 8), 15, 29),
        ((2, 1), 7, 7),
        ((1, 1, 2, 4, 8, 16, 1), 67, 67),
        ((), 1, 1),
    ],
)
def test_connected_taps(dilations, connected, field):
    found = coverage(dilations)
    assert (found.connected, found.field, len(found.taps), sum(found.taps)) == (connected, field, field, connected)


@settings(max_examples=60, deadline=None)
@given(STACKS)
def test_coverage_and_path_counts_are_those_of_all_paths_enumerated(stack):
    dilations, kernels = [d for d, _ in stack], [k for _, k in stack]
    ends = Counter(
        sum(tap * d for tap, d in zip(taps, dilations, strict=True)) for taps in product(*map(range, kernels))
    )
    found = coverage(dilations, kernels)
    assert found.field == max(ends) + 1
    assert found.taps == tuple(t in ends for t in range(found.field))
    assert found.connected == len(ends)
    assert path_counts(dilations, kernels) == tuple(ends[t] for t in range(found.field))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_the_rule_of_thumb_holds_for_ascending_dilations_only(dilations):
    ascending = sorted(dilations)
    fields = [1 + 2 * sum(ascending[:layer]) for layer in range(len(ascending))]
    found = coverage(ascending)
    assert (found.connected == found.field) == all(d <= f for d, f in zip(ascending, fields, strict=True))
    assert coverage(dilations) == found
    assert path_counts(dilations) == path_counts(ascending)


@pytest.mark.parametrize("dilations", [(2, 2, 2), (1, 4, 16), (1, 2, 4), (2, 1)])
def test_taps_are_those_that_a_real_context_module_depends_on(dilations):
    module = ContextModule(1, dilations).double()
    for p in module.parameters():
        torch.nn.init.constant_(p, 0.5)
    found = coverage(dilations)
    x = torch.ones(1, 1, found.field, found.field, dtype=torch.float64, requires_grad=True)
    module(x)[0, 0, found.field // 2, found.field // 2].backward()
    taps = np.array(found.taps)
    assert np.array_equal(x.grad[0, 0].numpy() != 0, np.outer(taps, taps))


def test_path_counts_stay_exact_beyond_floating_point():
    counts = path_counts((1, 2, 4) * 30)
    assert sum(counts) == 3**90
    assert counts == counts[::-1]
    assert len(counts) == coverage((1, 2, 4) * 30).field


def folded_by_convolutions(dilations, kernel, period):
    """Shares of the paths in each residue class: a comb of a period through circular convolutions with ones."""
    x = torch.zeros(1, 1, period, dtype=torch.float64)
    x[..., 0] = 1
    for dilation in dilations:
        response = torch.zeros_like(x)
        for tap in range(kernel):
            response += x.roll(tap * dilation, -1)
        x = response / kernel
    return x.flatten().numpy()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(2, 4))
def test_gridding_is_the_largest_lack_of_entropy_over_all_periods(dilations, kernel):
    periods = [m for m in range(2, 13) if any(d % m == 0 for d in dilations)]
    shares = {m: folded_by_convolutions(dilations, kernel, m) for m in periods}
    expected = max((1 - entropy(p) / np.log(m) for m, p in shares.items()), default=0)
    assert gridding(dilations, kernel) == pytest.approx(expected, abs=1e-12)
    assert 0 <= gridding(dilations, kernel) <= 1


@pytest.mark.parametrize("dilations", [(2, 2, 2), (2, 4, 8), (4, 6), (3,), (6, 10, 14)])
def test_gridding_is_1_on_a_lattice(dilations):
    assert gridding(dilations) == 1


@pytest.mark.parametrize("dilations", [(1, 3, 9), (1, 1, 1), (1, 3, 9, 27), ()])
def test_gridding_is_0_where_paths_do_not_depend_on_the_position(dilations):
    assert gridding(dilations) == 0


def test_gridding_ranks_stacks_as_the_literature_does():
    assert gridding((1, 2, 4)) == pytest.approx(1 - entropy([2, 1], base=2), abs=1e-12)
    assert gridding((1, 2, 4)) < 0.1
    assert gridding((1, 1, 2, 4, 8, 16, 1)) < 0.005
    assert gridding((1, 2, 4)) < gridding((1, 4, 16)) < gridding((2, 4, 8))
    # layers without dilation at the end (Yu et al. 2017), dilations without a common divisor (Wang et al. 2018)
    assert gridding((2, 2, 2, 1, 1)) < 0.02
    assert gridding((1, 2, 3)) < gridding((2, 2, 2)) / 50


def test_layers_with_one_tap_have_no_part_in_it():
    assert coverage((1, 1, 8), (3, 3, 1)) == coverage((1, 1))


def test_folded_paths_are_how_a_stack_of_ones_weighs_the_phases_of_a_comb():
    """By real convolutions over many periods, in which the ends of the field play no part."""
    ones = torch.ones(1, 1, 3, dtype=torch.float64)
    x = torch.zeros(1, 1, 60, dtype=torch.float64)
    x[..., ::4] = 1
    y = x
    for dilation in (1, 2, 4):
        y = F.conv1d(F.pad(y, (dilation, dilation), mode="circular"), ones, dilation=dilation)
    phases = y[0, 0, :4].numpy()
    assert np.array_equal(y[0, 0].numpy(), np.tile(phases, 15))
    assert np.allclose(sorted(phases), sorted(27 * folded_by_convolutions((1, 2, 4), 3, 4)))


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 1025))
def test_suggested_dilations(field):
    dilations = suggest_dilations(field)
    found = coverage(dilations)
    assert found.field == found.connected == field + (field % 2 == 0)
    assert found.gridding < 0.01
    if field > 7:
        *middle, last = dilations[2:]
        assert dilations[:2] == (1, 1)
        assert last == 1
        chain = [1, *middle]
        assert all(a <= b <= 2 * a for a, b in zip(chain, middle, strict=False))
        fewer = len(middle) - 1
        assert 1 + 2 * (3 + sum(2**n for n in range(1, fewer + 1))) < field  # the widest with a layer less


def test_suggestions_for_the_fields_of_the_paper_are_its_dilations():
    assert suggest_dilations(67) == (1, 1, 2, 4, 8, 16, 1)
    assert suggest_dilations(35) == (1, 1, 2, 4, 8, 1)
    assert suggest_dilations(259) == (1, 1, 2, 4, 8, 16, 32, 64, 1)
    assert [suggest_dilations(field) for field in (3, 4, 5, 7)] == [(1,), (1, 1), (1, 1), (1, 1, 1)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: suggest_dilations(2), "smallest is 3"),
        (lambda: coverage((1, 0)), "positive"),
        (lambda: coverage((1, 2), 0), "positive"),
        (lambda: path_counts((1, 2), (3,)), "2 dilations"),
        (lambda: gridding((1, -2)), "positive"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
