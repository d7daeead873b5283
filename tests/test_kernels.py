"""One kernel for a stack of linear convolutions, against the stack itself, torch.kron and scipy."""

from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.inspection.kernels import compose_kernels, gallery, is_kronecker, ranks, spectra


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def four(kernel):
    return kernel if kernel.ndim == 4 else kernel[None, None]


def run(x, kernels, dilations):
    """The stack, valid."""
    for kernel, dilation in zip(kernels, dilations, strict=True):
        x = F.conv2d(x, four(kernel), dilation=dilation)
    return x


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def stack_error(kernels, dilations):
    """Relative difference of the composed kernel's output from the stack's."""
    composed = four(compose_kernels(kernels, dilations))
    x = normal(2, four(kernels[0]).shape[1], composed.shape[2] + 6, composed.shape[3] + 9, seed=1)
    return difference(F.conv2d(x, composed), run(x, kernels, dilations))


@pytest.mark.parametrize(("side", "layers"), [(2, 3), (3, 3), (5, 2), (3, 4)])
def test_kronecker_product_equals_the_stack(side, layers):
    kernels = normal(layers, side, side).unbind()
    dilations = [side**layer for layer in range(layers)]
    composed = compose_kernels(kernels, dilations)
    assert is_kronecker(kernels, dilations)
    assert difference(composed, reduce(torch.kron, reversed(kernels))) < 1e-14
    assert stack_error(kernels, dilations) < 1e-10
    assert difference(reduce(torch.kron, kernels), composed) > 1  # the order matters


def test_rectangular_kernels():
    kernels = [normal(2, 3, seed=1), normal(2, 3, seed=2), normal(2, 3, seed=3)]
    dilations = [(1, 1), (2, 3), (4, 9)]
    assert is_kronecker(kernels, dilations)
    assert compose_kernels(kernels, dilations).shape == (8, 27)
    assert stack_error(kernels, dilations) < 1e-10


def test_kernels_of_several_sizes_are_kronecker_where_dilations_are_the_fields_below():
    kernels = [normal(3, 3), normal(5, 1, seed=1), normal(2, 4, seed=2)]
    assert is_kronecker(kernels, [1, (3, 7), (15, 3)])  # along one tap the dilation plays no part
    assert stack_error(kernels, [1, (3, 7), (15, 3)]) < 1e-10
    assert not is_kronecker(kernels, [1, 3, 15])


def test_channels_multiply_as_matrices():
    kernels = [normal(out, inp, 3, 3, seed=out) for inp, out in pairwise((3, 4, 2, 5))]
    composed = compose_kernels(kernels, [1, 3, 9])
    assert composed.shape == (5, 3, 27, 27)
    assert stack_error(kernels, [1, 3, 9]) < 1e-10
    # K[t_2 t_1 t_0] = K_2[t_2] K_1[t_1] K_0[t_0] at one tap
    expected = kernels[2][:, :, 2, 0] @ kernels[1][:, :, 0, 1] @ kernels[0][:, :, 1, 2]
    assert torch.allclose(composed[:, :, 2 * 9 + 0 * 3 + 1, 0 * 9 + 1 * 3 + 2], expected, atol=1e-12)


def test_the_papers_dilations_are_no_kronecker_product():
    kernels = normal(3, 3, 3).unbind()
    composed = compose_kernels(kernels, [1, 2, 4])
    assert not is_kronecker(kernels, [1, 2, 4])
    assert composed.shape == (15, 15)
    assert (composed != 0).sum() == 225
    assert stack_error(kernels, [1, 2, 4]) < 1e-10
    wrong = reduce(torch.kron, reversed(kernels))[6:-6, 6:-6]  # 27x27, its centre
    assert difference(wrong, composed) > 1


LAYER = st.tuples(*[st.integers(1, 4)] * 4, st.integers(1, 3))  # kernel, dilation, channels


@settings(max_examples=40, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=4), st.integers(1, 3))
def test_any_stack_equals_its_kernel(layers, channels):
    kernels, dilations = [], []
    for number, (kh, kw, dh, dw, out) in enumerate(layers):
        kernels.append(normal(out, channels, kh, kw, seed=number))
        dilations.append((dh, dw))
        channels = out
    assert stack_error(kernels, dilations) < 1e-10


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3), st.integers(1, 3))
def test_the_product_and_the_impulse_response_agree(sizes, channels):
    """Where it is a Kronecker product, against the correlation of scipy with each channel pair summed."""
    kernels, dilations, field = [], [], (1, 1)
    for number, size in enumerate(sizes):
        kernels.append(normal(2 if number % 2 else 1, channels, *size, seed=number))
        dilations.append(field)
        channels, field = len(kernels[-1]), (field[0] * size[0], field[1] * size[1])
    assert is_kronecker(kernels, dilations)
    composed = compose_kernels(kernels, dilations)
    assert composed.shape[2:] == field
    x = normal(composed.shape[1], field[0] + 4, field[1] + 5, seed=9)
    expected = run(x[None], kernels, dilations)[0]
    for out in range(len(composed)):
        by_scipy = sum(correlate2d(a.numpy(), k.numpy(), "valid") for a, k in zip(x, composed[out], strict=True))
        assert np.allclose(by_scipy, expected[out].numpy(), atol=1e-10)


def padded_run(x, kernels, dilations, mode, *, once):
    """The stack with the size kept: padded before each layer or once before the first."""
    if once:
        return run(F.pad(x, (sum(dilations),) * 4, mode=mode), kernels, dilations)
    for kernel, d in zip(kernels, dilations, strict=True):
        x = F.conv2d(F.pad(x, (d,) * 4, mode=mode), kernel[None, None], dilation=d)
    return x


def test_what_borders_do_to_the_equality():
    kernels, dilations = normal(3, 3, 3).unbind(), (1, 3, 9)
    composed = compose_kernels(kernels, dilations)[None, None]
    x = normal(1, 1, 64, 64, seed=1)
    error = {
        mode: (F.conv2d(F.pad(x, (13,) * 4, mode=mode), composed) - padded_run(x, kernels, dilations, mode, once=False))
        for mode in ("constant", "circular", "reflect")
    }
    assert error["constant"].abs().max() > 1  # rows outside of the image are not zero in between
    assert error["constant"][..., 13:-13, 13:-13].abs().max() < 1e-10
    assert error["circular"].abs().max() < 1e-10
    assert error["reflect"].abs().max() > 0.1
    for mode in error:
        once = padded_run(x, kernels, dilations, mode, once=True)
        assert difference(F.conv2d(F.pad(x, (13,) * 4, mode=mode), composed), once) < 1e-10


def test_float32_stays_float32_and_autograd_goes_through():
    kernels = [normal(3, 3).float().requires_grad_(), normal(3, 3, seed=1).float()]
    for dilations in ([1, 3], [1, 2]):
        composed = compose_kernels(kernels, dilations)
        assert composed.dtype == torch.float32
        assert torch.autograd.grad(composed.sum(), kernels[0])[0].norm() > 0


@pytest.mark.parametrize(
    ("shapes", "dilations", "words"),
    [
        ([], [], "one dilation for each"),
        ([(3, 3)], [1, 2], "1 kernels and 2 dilations"),
        ([(3, 3)], [0], "positive"),
        ([(3, 3)], [(1, 2, 3)], "pairs"),
        ([(3, 3), (1, 1, 3, 3)], [1, 3], "expected all"),
        ([(3,)], [1], "expected all"),
        ([(0, 3)], [1], "none empty"),
        ([(4, 3, 3, 3), (2, 5, 3, 3)], [1, 3], "takes 5 channels, the one before gives 4"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(shapes, dilations, words):
    with pytest.raises(ConfigError, match=words):
        compose_kernels([torch.ones(shape) for shape in shapes], dilations)


def test_gallery_full_rank_from_fewer_numbers():
    found = gallery(3, count=4)
    assert found.numbers == (27, 54, 729)
    for kind, rank in ((found.composed, 27), (found.rank_one, 1)):
        assert kind.shape == (4, 27, 27)
        assert torch.allclose(kind.flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64))
        assert [np.linalg.matrix_rank(k) for k in kind.numpy()] == [rank] * 4
        assert ranks(kind).tolist() == [rank] * 4
        values = np.linalg.svd(kind.numpy(), compute_uv=False)
        assert np.allclose(spectra(kind), values / values[:, :1], atol=1e-12)
    assert torch.equal(gallery(3, count=4).composed, found.composed)
    assert not torch.equal(gallery(4, count=4).composed, found.composed)
    assert gallery(0, count=1, layers=2).numbers == (18, 18, 81)


def test_singular_values_of_composed_kernels_are_products():
    kernels = normal(3, 3, 3).unbind()
    parts = [np.linalg.svd(k.numpy(), compute_uv=False) for k in kernels]
    products = np.sort(np.einsum("i,j,k->ijk", *parts).ravel())[::-1]
    assert np.allclose(spectra(compose_kernels(kernels, [1, 3, 9])), products / products[0], atol=1e-12)
