"""Losses and metrics against torch, scikit-image and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat
from skimage.metrics import peak_signal_noise_ratio
from torch.nn import functional as F

from densectx.errors import ConfigError
from densectx.losses import Charbonnier, Criterion, CrossEntropy
from densectx.metrics import ConfusionMetrics, ImageMetrics, psnr
from densectx.nn.colour import lab_to_rgb, luma, rgb_to_lab
from densectx.nn.resize import bicubic, mirror, pad_to_multiple
from densectx.registry import LOSSES


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch(weights, smoothing):
    logits, mask = torch.randn(2, 3, 5, 4), torch.randint(0, 3, (2, 5, 4))
    mask[0, :2] = 7
    total, weight = CrossEntropy(7, class_weights=weights, label_smoothing=smoothing)(logits, mask)
    tensor = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(logits, mask, tensor, ignore_index=7, label_smoothing=smoothing)
    assert torch.allclose(total / weight, expected)


@pytest.mark.parametrize(("name", "reference"), [("l1", F.l1_loss), ("mse", F.mse_loss)])
def test_elementwise_losses_ignore_nan(name, reference):
    output, target = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    target[0, 1] = torch.nan
    total, weight = LOSSES.build(name)(output, target)
    known = ~target.isnan()
    assert torch.allclose(total / weight, reference(output[known], target[known]))
    total.backward()
    assert torch.isfinite(output.grad).all()


def test_charbonnier_gradient():
    target = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    output = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Charbonnier(0.1)(x, target)[0], output)


def test_criterion_lists_terms_with_coefficients():
    criterion = Criterion([{"name": "l1", "weight": 2}, "mse"])
    assert criterion.coefficients == {"l1": 2.0, "mse": 1.0}
    assert set(criterion(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))) == {"l1", "mse"}
    with pytest.raises(ConfigError, match="twice"):
        Criterion(["l1", "l1"])
    with pytest.raises(ConfigError, match="did you mean 'charbonnier'"):
        Criterion("charbonier")


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10_000))
def test_confusion_metrics_equal_brute_force(classes, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes + 1, (3, 4, 5))
    truth[truth == classes] = 255
    guess = rng.integers(0, classes, (3, 4, 5))
    metrics = ConfusionMetrics(classes, 255)
    for t, g in zip(truth, guess, strict=True):  # one image at a time: one matrix over everything
        metrics.update(torch.tensor(g)[None], torch.tensor(t)[None])
    known = truth != 255
    t, g = truth[known], guess[known]
    ious = [
        ((t == c) & (g == c)).sum() / ((t == c) | (g == c)).sum() for c in range(classes) if ((t == c) | (g == c)).any()
    ]
    values = metrics.compute()
    assert values["miou"].item() == pytest.approx(100 * np.mean(ious))
    assert values["pixel_accuracy"].item() == pytest.approx(100 * (t == g).mean())
    majority = np.bincount(t, minlength=classes).argmax()
    constant = ConfusionMetrics(classes, 255)
    constant.update(torch.full((3, 4, 5), int(majority)), torch.tensor(truth))
    assert values["miou_majority"].item() == pytest.approx(constant.compute()["miou"].item())


def test_absent_class_is_left_out_of_the_mean():
    metrics = ConfusionMetrics(3, 255)
    metrics.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    assert metrics.compute()["miou"].item() == 100


def test_psnr_is_a_mean_over_images_and_never_infinite():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 8, 8)), rng.random((2, 3, 8, 8))
    metrics = ImageMetrics({"psnr": psnr}, "same")
    metrics.update(torch.tensor(a), torch.tensor(b), torch.tensor(b))
    expected = np.mean([peak_signal_noise_ratio(y, x, data_range=1) for x, y in zip(a, b, strict=True)])
    values = metrics.compute()
    assert values["psnr"].item() == pytest.approx(expected, rel=1e-6)
    assert values["psnr_same"].item() == pytest.approx(100)


def test_lab_agrees_with_scikit_image():
    from skimage.color import rgb2lab

    x = torch.rand(1, 3, 16, 16)
    expected = rgb2lab(x[0].permute(1, 2, 0).numpy())
    assert np.abs(rgb_to_lab(x)[0].permute(1, 2, 0).numpy() - expected).max() < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rgb_to_lab(x), rgb_to_lab(x.clone()))
        assert (lab_to_rgb(rgb_to_lab(x)) - x).abs().max() < 1e-4


def test_luma_is_matlabs():
    assert luma(torch.ones(1, 3, 1, 1)).item() * 255 == pytest.approx(235, abs=1e-3)
    assert luma(torch.zeros(1, 3, 1, 1)).item() * 255 == pytest.approx(16, abs=1e-3)


def test_bicubic_equals_matlab_on_golden_files(data_root):
    """MATLAB's own imresize of Set5's luma, both ways, borders included."""
    files = sorted((data_root / "set5" / "golden_mat").glob("*.mat"))
    assert files
    for file in files:
        golden = loadmat(file)
        large, small, again = (torch.tensor(golden[key])[None, None] for key in ("im_gt_y", "im_l_y", "im_b_y"))
        assert (bicubic(large, down=2) - small).abs().max() < 1e-12
        assert (bicubic(small, up=2) - again).abs().max() < 1e-12


@pytest.mark.parametrize(("up", "down"), [(2, 1), (3, 1), (1, 2), (1, 4)])
def test_bicubic_keeps_constants_and_shape(up, down):
    x = torch.full((1, 2, 4, 8), 0.3)
    y = bicubic(x, up=up, down=down)
    assert y.shape == (1, 2, 4 * up // down, 8 * up // down)
    assert torch.allclose(y, torch.tensor(0.3), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20))
def test_mirror_equals_numpy_symmetric(height, width, margin):
    x = np.random.default_rng(0).random((height, width))
    expected = np.pad(x, margin, mode="symmetric")
    assert np.array_equal(mirror(torch.tensor(x)[None, None], margin)[0, 0].numpy(), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 4, 8]))
def test_padding_repeats_the_border(height, width, multiple):
    x = np.random.default_rng(0).random((height, width))
    padded = pad_to_multiple(torch.tensor(x)[None, None], multiple)[0, 0].numpy()
    expected = np.pad(x, ((0, -height % multiple), (0, -width % multiple)), mode="edge")
    assert np.array_equal(padded, expected)
