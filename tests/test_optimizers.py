"""AdaMuon beside its equations in float64, timm's and torch's AdamW."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm.optim
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from densectx.errors import ConfigError
from densectx.optimizers import AdaMuon, is_matrix, orthogonal

QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
SHAPES = [(8, 6, 3, 3), (6, 8, 1, 1), (40, 4, 1, 1), (5, 30), (30, 5)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def newton_schulz(matrix):
    """The five steps on the singular values themselves."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    values = values / max(np.sqrt((values**2).sum()), 1e-7)
    for a, b, c in QUINTIC:
        values = a * values + b * values**3 + c * values**5
    return left @ np.diag(values) @ right


def matrices():
    sides = st.integers(1, 40)
    return st.builds(
        lambda rows, columns, decades, size, seed: (
            np.random.default_rng(seed).normal(size=(rows, columns))
            * 10.0 ** np.linspace(0, -decades, columns)
            * 10.0**size
        ).astype(np.float32),
        sides,
        sides,
        st.floats(0, 6),
        st.floats(-4, 4),
        st.integers(0, 1000),
    )


@given(matrix=matrices())
def test_orthogonal_is_the_polynomial_of_the_singular_values(matrix):
    found = orthogonal(torch.from_numpy(matrix)).numpy()
    assert np.abs(found - newton_schulz(matrix)).max() < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-5), ("high", 0.03), ("medium", 0.15)])
def test_orthogonal_survives_a_lower_precision_of_products(device, precision, tolerance):
    matrix = np.random.default_rng(0).normal(size=(64, 576)) * 10.0 ** np.linspace(0, -4, 576)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = orthogonal(torch.from_numpy(matrix).to(device)).cpu().double().numpy()
    finally:
        torch.set_float32_matmul_precision(before)
    wanted = newton_schulz(matrix)
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)


def test_orthogonal_of_zeros_is_zero():
    assert torch.equal(orthogonal(torch.zeros(5, 7)), torch.zeros(5, 7))


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_follow_the_equations(shape):
    random = np.random.default_rng(1)
    value = random.normal(size=shape)
    weight = nn.Parameter(torch.tensor(value, dtype=torch.float32))
    optimizer = AdaMuon([weight], lr=0.02, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.7))
    average = square = np.zeros(shape)
    for _ in range(4):
        gradient = random.normal(size=shape)
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        average = 0.9 * average + 0.1 * gradient
        update = newton_schulz(average.reshape(shape[0], -1)).reshape(shape)
        square = 0.7 * square + 0.3 * update**2
        update = update / np.sqrt(square)
        value = value * (1 - 0.02 * 0.1) - 0.02 * 0.2 * update / np.sqrt((update**2).mean())
    assert np.abs(weight.detach().numpy() - value).max() < 1e-3 * 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_goes_where_timm_goes(shape):
    torch.manual_seed(0)
    start, target = torch.randn(shape), torch.randn(shape)

    def moved(make):
        weight = nn.Parameter(start.clone())
        optimizer = make([weight])
        for _ in range(20):
            optimizer.zero_grad()
            (weight - target).square().sum().backward()
            optimizer.step()
        return (weight.detach() - start).flatten()

    ours = moved(lambda ps: AdaMuon(ps, lr=0.05, weight_decay=0.01))
    theirs = moved(lambda ps: timm.optim.Muon(ps, lr=0.05, weight_decay=0.01, algo="adamuon"))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99  # theirs computes in bfloat16
    assert 0.97 < ours.norm() / theirs.norm() < 1.03


@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        (7,),
        (),
        (8, 1, 3, 3),
        (1, 8, 3, 3),
        (3, 8, 1, 1),
        (64, 3),
        (4, 513),
        (4, 512),
        (1, 16, 16),
        (0, 5),
        (5, 0),
    ],
)
def test_takes_the_matrices_that_timm_takes(shape):
    weight = nn.Parameter(torch.randn(shape))
    optimizer = timm.optim.Muon([weight], algo="adamuon")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert is_matrix(weight) == optimizer.state[weight]["use_muon"]


@pytest.mark.parametrize("shape", [(), (7,), (8, 1, 3, 3)])
def test_vectors_move_by_adamw(shape):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = [
        AdaMuon([ours], lr=0.1, weight_decay=0.2, betas=(0.8, 0.7)),
        torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, betas=(0.8, 0.7), eps=1e-7),
    ]
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_minimises_through_a_closure(device, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))
    net = net.to(device, dtype, memory_format=torch.channels_last)
    optimizer = AdaMuon(net.parameters(), lr=0.01)
    picture = torch.randn(2, 4, 16, 16, device=device, dtype=dtype)

    def closure():
        optimizer.zero_grad()
        loss = (net(picture) - picture).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    assert all(parameter.dtype == dtype for parameter in net.parameters())


def test_a_weight_without_gradient_stays_and_one_of_rate_zero_too():
    still, frozen = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    values = still.detach().clone(), frozen.detach().clone()
    frozen.grad = torch.randn(8, 8)
    AdaMuon([{"params": [still]}, {"params": [frozen], "lr": 0.0}], weight_decay=0.1).step()
    assert torch.equal(still, values[0])
    assert torch.equal(frozen, values[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": -1.0}, "lr -1.0 is not in"),
        ({"lr": math.nan}, "lr nan"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"momentum": 1.0}, r"momentum 1.0 is not in \[0, 1\)"),
        ({"betas": (0.9, 1.5)}, "betas 1.5"),
        ({"betas": 0.9}, "betas: expected two numbers, got 0.9"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        AdaMuon([nn.Parameter(torch.randn(4, 4))], **options)
    with pytest.raises(ConfigError, match=said):
        AdaMuon([{"params": [nn.Parameter(torch.randn(4, 4))], **options}])


def test_weights_whose_averages_would_underflow_are_refused():
    with pytest.raises(ConfigError, match="underflow in float16"):
        AdaMuon([nn.Parameter(torch.randn(4, 4, dtype=torch.float16))])
