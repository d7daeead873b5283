"""Metrics over ranks are those of one process: counts to the last one, sums to rounding in float64."""

from __future__ import annotations

import importlib.util
import inspect
import json
import pkgutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import Metric

import densectx.metrics

FILE = Path(__file__).with_name("metric_cases.py")
TOLERANCE = 1e-12


def loaded():
    spec = importlib.util.spec_from_file_location("metric_cases", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["metric_cases"] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


CASES = loaded().cases()


def values(metric):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        return {name: value.item() for name, value in metric.compute().items()}


def states(metric):
    return {name: getattr(metric, name) for name in metric._defaults}


def counted(case, samples, batches):
    """The metric after batches of these samples, each a list of indices."""
    metric = case.make()
    for batch in batches:
        metric.update(*(argument[batch] for argument in samples))
    return metric


def test_every_metric_has_a_case():
    found = set()
    for module in pkgutil.iter_modules(densectx.metrics.__path__, "densectx.metrics."):
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(kind, Metric) and kind.__module__ == module.name:
                found.add(kind.__name__)
    assert found <= CASES.keys()


@pytest.mark.fault("D11")
@pytest.mark.parametrize("name", CASES)
def test_random_splits_over_ranks(name, record_property):
    """States of played ranks, added as a reduction adds them."""
    case, examples = CASES[name], 0

    @settings(max_examples=40, deadline=None, database=None)
    @given(
        seed=st.integers(0, 2**31),
        world=st.integers(1, 3),
        places=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=7),
    )
    def check(seed, world, places):
        """Places: rank of each sample, and whether it begins a batch there."""
        nonlocal examples
        examples += 1
        samples = case.samples(len(places), torch.Generator().manual_seed(seed))
        batches = [[] for _ in range(world)]
        for index, (rank, begins) in enumerate(places):
            own = batches[rank % world]
            own.append([index]) if begins or not own else own[-1].append(index)
        one = counted(case, samples, [list(range(len(places)))])
        parts = [counted(case, samples, own) for own in batches]
        total = case.make()
        for state, start in states(total).items():
            setattr(total, state, start + sum(getattr(part, state) for part in parts))
        total._update_count = 1
        for state, expected in states(one).items():
            found = states(total)[state]
            if expected.is_floating_point():
                assert expected.dtype == torch.float64
                assert torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE), state
            else:
                assert torch.equal(found, expected), state
        assert values(total) == pytest.approx(values(one), rel=TOLERANCE, abs=TOLERANCE, nan_ok=True)

    check()
    record_property("count", examples)


CODE = """
import json, sys
from datetime import timedelta
import torch
sys.path.insert(0, words[0])
import metric_cases
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
for name, case in metric_cases.cases().items():
    metric, samples = case.make(), case.samples(5, torch.Generator().manual_seed(1))
    for index in range(number, 5, 3):
        metric.update(*(argument[index : index + 1] for argument in samples))
    if number == 0:
        metric_values = {key: value.item() for key, value in metric.compute().items()}
        print("FOUND", json.dumps([name, metric_values]), flush=True)
    else:
        metric.compute()
"""


@pytest.mark.fault("D11")
def test_three_processes(ranks):
    """The reduction itself, over gloo: two, two and one sample."""
    said = ranks(3, CODE, "metrics", [str(FILE.parent)])
    found = dict(json.loads(line[6:]) for line in said.splitlines() if line.startswith("FOUND"))
    assert found.keys() == CASES.keys()
    for name, case in CASES.items():
        one = counted(case, case.samples(5, torch.Generator().manual_seed(1)), [[0], [1], [2], [3], [4]])
        assert found[name] == pytest.approx(values(one), rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), name
