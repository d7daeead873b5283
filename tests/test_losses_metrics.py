"""Losses and metrics against torch, scikit-image and brute force."""

from typing import final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat
from skimage.metrics import peak_signal_noise_ratio
from torch.nn import functional as F

from densectx.errors import ConfigError, PluginError
from densectx.losses import BCE, Charbonnier, Criterion, CrossEntropy, Dice, Focal, Loss, Lovasz, Tversky
from densectx.losses.lovasz import lovasz_jaccard
from densectx.metrics import ConfusionMetrics, ImageMetrics, psnr
from densectx.nn.colour import lab_to_rgb, luma, rgb_to_lab
from densectx.nn.resize import bicubic, mirror, pad_to_multiple
from densectx.registry import LOSSES


@pytest.mark.fault("N07")
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch(weights, smoothing):
    logits, mask = torch.randn(2, 3, 5, 4), torch.randint(0, 3, (2, 5, 4))
    mask[0, :2] = 7
    total, weight = CrossEntropy(7, class_weights=weights, label_smoothing=smoothing)(logits, mask)
    tensor = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(logits, mask, tensor, ignore_index=7, label_smoothing=smoothing)
    assert torch.allclose(total / weight, expected)


@pytest.mark.fault("N07")
@pytest.mark.parametrize(("name", "reference"), [("l1", F.l1_loss), ("mse", F.mse_loss)])
def test_elementwise_losses_ignore_nan(name, reference):
    output, target = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    target[0, 1] = torch.nan
    total, weight = LOSSES.build(name)(output, target)
    known = ~target.isnan()
    assert torch.allclose(total / weight, reference(output[known], target[known]))
    total.backward()
    assert torch.isfinite(output.grad).all()


@pytest.mark.parametrize("name", ["l1", "mse", "charbonnier"])
def test_numbers_of_another_shape_are_refused(name):
    with pytest.raises(PluginError, match=r"the output is \(4, 1, 8, 8\), the target \(4, 8, 8\); expected one shape"):
        LOSSES.build(name)(torch.rand(4, 1, 8, 8), torch.rand(4, 8, 8))


@final
class Huber(Loss):
    """Of another package, which checks no shapes."""

    def forward(self, output, target):
        return F.huber_loss(output, target, reduction="sum"), target.new_tensor(target.numel())


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("form", ["numbers", "labels"])
@pytest.mark.parametrize("wrong", [(4, 8, 8), (1, 1, 8, 8), (4, 1, 1, 8), (8, 8)])
def test_no_loss_pairs_pixels_with_those_of_others(form, wrong):
    LOSSES.register("huber_of_others")(Huber)
    try:
        criterion = Criterion("huber_of_others", form=form)
    finally:
        LOSSES.unregister("huber_of_others")
    output = torch.rand(4, 1, 8, 8)
    with pytest.raises(
        PluginError, match=r"loss huber_of_others: the output is \(4, 1, 8, 8\), the target \(.*B, H and W"
    ):
        criterion(output, torch.rand(wrong))
    assert criterion(output, torch.rand(4, 1, 8, 8))["huber_of_others"][1] == 256


@pytest.mark.fault("N06")
def test_charbonnier_gradient():
    target = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    output = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Charbonnier(0.1)(x, target)[0], output)


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan"), "abc", None, [1], True])
def test_a_weight_of_a_loss_is_a_number_of_at_least_zero(weight):
    with pytest.raises(ConfigError, match=r"tasks\.depth\.loss\.weight: expected a finite number of at least 0, got"):
        Criterion(["mse", {"name": "l1", "weight": weight}], "tasks.depth.loss")


@pytest.mark.parametrize("loss", [CrossEntropy, Focal])
@pytest.mark.parametrize("weights", [[-1.0, 1.0], [float("inf"), 1.0], [float("nan"), 1.0], [0.0, 0.0]])
def test_class_weights_that_would_turn_or_void_the_gradient_are_refused(loss, weights):
    with pytest.raises(ConfigError, match="expected numbers from 0 up, not all 0"):
        loss(class_weights=weights)


def test_smoothing_and_a_class_without_weight_exclude_each_other():
    with pytest.raises(ConfigError, match="spreads pixels of a class with weight 0"):
        CrossEntropy(class_weights=[0.0, 1.0], label_smoothing=0.1)
    CrossEntropy(class_weights=[0.0, 1.0])


def test_criterion_lists_terms_with_coefficients():
    criterion = Criterion([{"name": "l1", "weight": 2}, "mse"])
    assert criterion.coefficients == {"l1": 2.0, "mse": 1.0}
    assert set(criterion(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))) == {"l1", "mse"}
    with pytest.raises(ConfigError, match="twice"):
        Criterion(["l1", "l1"])
    with pytest.raises(ConfigError, match="did you mean 'charbonnier'"):
        Criterion("charbonier")


def ids_batch(batch=3, classes=4, size=(6, 5), ignore=7):
    """Logits float64, and ids of which the first image shows one class less and the second has unlabelled pixels."""
    torch.manual_seed(0)
    logits = torch.randn(batch, classes, *size, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, classes, (batch, *size))
    ids[0] %= classes - 1
    ids[1, :2] = ignore
    return logits, ids


def labels_batch(batch=3, classes=2, size=(6, 5)):
    torch.manual_seed(0)
    logits = torch.randn(batch, classes, *size, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (batch, classes, *size)).double()
    labels[1, :, :2] = torch.nan
    return logits, labels


def value(pair):
    return pair[0] / pair[1]


@pytest.mark.fault("N07")
def test_focal_equals_smp_and_with_gamma_0_cross_entropy():
    from segmentation_models_pytorch.losses._functional import focal_loss_with_logits, softmax_focal_loss_with_logits

    logits, ids = ids_batch()
    known = ids != 7
    flat = logits.permute(0, 2, 3, 1)[known]
    for gamma in (0.0, 0.5, 2.0):
        expected = softmax_focal_loss_with_logits(flat, ids[known], gamma=gamma)
        assert torch.allclose(value(Focal(7, gamma=gamma)(logits, ids)), expected)
    weights = [0.5, 2.0, 1.0, 3.0]
    expected = value(CrossEntropy(7, class_weights=weights)(logits, ids))
    assert torch.allclose(value(Focal(7, gamma=0.0, class_weights=weights)(logits, ids)), expected)
    logits, labels = labels_batch()
    known = ~labels.isnan()
    expected = focal_loss_with_logits(logits[known], labels[known], gamma=2.0, alpha=0.25)
    assert torch.allclose(value(Focal(alpha=0.25)(logits, labels)), expected)


@pytest.mark.fault("N07")
def test_bce_equals_torch():
    logits, labels = labels_batch()
    known = ~labels.isnan()
    for weight in (None, 3.0, [0.5, 4.0]):
        factor = torch.ones(()) if weight is None else torch.tensor(weight, dtype=torch.float64)
        full = factor.expand(2)[None, :, None, None].expand_as(logits)[known]
        expected = F.binary_cross_entropy_with_logits(logits[known], labels[known], pos_weight=full)
        assert torch.allclose(value(BCE(pos_weight=weight)(logits, labels)), expected)


@pytest.mark.fault("N07")
def test_dice_and_tversky_equal_kornia_on_class_ids():
    """kornia's means are ours: over the classes an image shows, then over images."""
    from kornia.losses import dice_loss, tversky_loss

    logits, ids = ids_batch()
    expected = dice_loss(logits, ids, average="macro", eps=0.0, ignore_index=7)
    assert torch.allclose(value(Dice(7, smooth=0.0)(logits, ids)), expected)
    assert torch.allclose(value(Tversky(7, alpha=0.5, beta=0.5, smooth=0.0)(logits, ids)), expected)
    expected = tversky_loss(logits, ids, alpha=0.2, beta=0.9, eps=0.0, ignore_index=7)
    assert torch.allclose(value(Tversky(7, alpha=0.2, beta=0.9, smooth=0.0)(logits, ids)), expected)


@pytest.mark.fault("N07")
def test_dice_and_tversky_equal_smp_on_labels():
    """smp sums over the batch, so image by image; its mask multiplies instead of NaN."""
    from segmentation_models_pytorch.losses import DiceLoss, TverskyLoss

    logits, labels = labels_batch()
    for i in range(3):
        one, truth = logits[i : i + 1], labels[i : i + 1]
        known = ~truth[0, 0].isnan()
        cut, clear = one[..., known], truth[..., known]
        expected = DiceLoss("multilabel", smooth=0.0)(cut, clear)
        assert torch.allclose(value(Dice(smooth=0.0)(one, truth)), expected)
        expected = TverskyLoss("multilabel", alpha=0.3, beta=0.7, smooth=1.0)(cut, clear)
        assert torch.allclose(value(Tversky()(one, truth)), expected)


def test_focal_tversky_and_smoothing_by_hand():
    logits = torch.zeros(1, 1, 1, 4, dtype=torch.float64)  # p = 0.5 each
    labels = torch.tensor([[[[1.0, 0.0, 0.0, torch.nan]]]], dtype=torch.float64)
    # TP 0.5, FP 1.0, FN 0.5
    index = (0.5 + 1) / (0.5 + 0.2 * 1.0 + 0.6 * 0.5 + 1)
    loss = Tversky(alpha=0.2, beta=0.6, exponent=0.75, smooth=1.0)
    assert value(loss(logits, labels)).item() == pytest.approx((1 - index) ** 0.75)
    assert value(Dice(smooth=2.0)(logits, labels)).item() == pytest.approx(1 - (1 + 2) / (1 + 1.5 + 2))


@pytest.mark.fault("N07")
def test_lovasz_equals_smp_image_by_image():
    from segmentation_models_pytorch.losses import LovaszLoss

    logits, ids = ids_batch()
    logits = logits.detach().float()
    expected = LovaszLoss("multiclass", per_image=True, ignore_index=7)(logits, ids)
    assert torch.allclose(value(Lovasz(7)(logits, ids)), expected)


@pytest.mark.fault("N07")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_lovasz_extension_of_0_and_1_is_the_jaccard_loss(pixels, seed):
    rng = np.random.default_rng(seed)
    answer, truth, known = (torch.tensor(rng.integers(0, 2, (3, pixels))).double() for _ in range(3))
    both, either = (answer * truth * known).sum(1), ((answer + truth).clamp_max(1) * known).sum(1)
    expected = torch.where(either > 0, 1 - both / either.clamp_min(1), 0.0)
    loss = lovasz_jaccard(answer * known, truth * known, known.bool())
    assert torch.allclose(loss, expected)


def test_lovasz_of_an_absent_label_is_its_greatest_probability():
    logits = torch.randn(1, 1, 3, 4)
    loss = Lovasz()(logits, torch.zeros(1, 1, 3, 4))
    assert value(loss).item() == pytest.approx(logits.sigmoid().max().item())
    total, weight = Lovasz(absent=False)(logits, torch.zeros(1, 1, 3, 4))
    assert (total.item(), weight.item()) == (0, 0)


PIXELWISE = [Focal(7), Focal(7, gamma=0.5), Focal(7, class_weights=[1, 2, 3, 4])]
REGION = [Dice(7), Dice(7, absent=True), Tversky(7, exponent=0.75), Lovasz(7), Lovasz(7, absent=True)]


@pytest.mark.fault("N06")
@pytest.mark.parametrize("loss", PIXELWISE + REGION, ids=str)
def test_gradients_of_losses_of_ids(loss):
    logits, ids = ids_batch(batch=2, size=(3, 4))
    assert torch.autograd.gradcheck(lambda x: value(loss(x, ids)), logits)


@pytest.mark.fault("N06")
@pytest.mark.parametrize("loss", [BCE(pos_weight=3.0), Focal(alpha=0.25), Focal(gamma=0.5), *REGION], ids=str)
def test_gradients_of_losses_of_labels(loss):
    logits, labels = labels_batch(batch=2, size=(3, 4))
    assert torch.autograd.gradcheck(lambda x: value(loss(x, labels)), logits)


@pytest.mark.parametrize("loss", [*PIXELWISE, *REGION, BCE()], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_losses_of_certain_answers_are_finite(loss, sign):
    """Probabilities that are exactly 0 and 1: right ones cost nothing, and no gradient is NaN."""
    ids = torch.randint(0, 4, (2, 5, 5))
    truth = F.one_hot(ids, 4).permute(0, 3, 1, 2).float()
    for target in (ids, truth) if "ids" in loss.takes else (truth,):
        logits = (sign * (truth - 0.5) * 1e4).requires_grad_()
        total, weight = loss(logits, target)
        total.backward()
        assert torch.isfinite(logits.grad).all()
        assert total / weight < 1e-4 if sign == 1 else total / weight > 0.2


@pytest.mark.parametrize("loss", REGION, ids=str)
def test_region_losses_weigh_images_and_not_pixels(loss):
    logits, ids = ids_batch(batch=4)
    ids[3] = 7
    total, weight = loss(logits, ids)
    assert weight.item() == 3
    ids[1, 2:, 1:] = 7  # almost nothing is left of image 1, which counts as much as before
    assert loss(logits, ids)[1].item() == 3
    total.backward()
    assert torch.equal(logits.grad[3], torch.zeros_like(logits.grad[3]))
    assert torch.equal(logits.grad[1, :, :2], torch.zeros_like(logits.grad[1, :, :2]))


@pytest.mark.parametrize(
    ("spec", "form", "message"),
    [
        ("cross_entropy", "labels", "'cross_entropy' is for class ids.*labels of 0 or 1; take bce, dice, focal"),
        ("bce", "ids", "'bce' is for labels of 0 or 1.*class ids; take cross_entropy, dice, focal, lovasz, tversky"),
        ("mse", "ids", "'mse' is for numbers"),
        ("dice", "numbers", "take charbonnier, l1, mse"),
        ({"name": "focal", "alpha": 0.5}, "ids", "class_weights"),
        ({"name": "focal", "class_weights": [1.0]}, "labels", "take alpha"),
        ({"name": "focal", "class_weights": [1.0]}, "ids", "1 class_weights for 4"),
        ({"name": "focal", "gamma": -1}, "ids", "negative"),
        ({"name": "bce", "pos_weight": [1.0]}, "labels", "1 pos_weights for 4"),
        ({"name": "bce", "pos_weight": -1}, "labels", "positive"),
        ({"name": "tversky", "alpha": -1}, "ids", "at least 0"),
        ({"name": "dice", "smooth": -1}, "ids", "negative"),
        ({"name": "dice", "form": "ids"}, "ids", "set by densectx"),
    ],
)
def test_unfit_losses_are_refused(spec, form, message):
    with pytest.raises(ConfigError, match=message):
        Criterion(spec, form=form, classes=4, ignore_index=255)


@pytest.mark.fault("N07")
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


@pytest.mark.fault("N07")
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


@pytest.mark.fault("N07")
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


@pytest.mark.fault("N07")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20))
def test_mirror_equals_numpy_symmetric(height, width, margin):
    x = np.random.default_rng(0).random((height, width))
    expected = np.pad(x, margin, mode="symmetric")
    assert np.array_equal(mirror(torch.tensor(x)[None, None], margin)[0, 0].numpy(), expected)


@pytest.mark.fault("N07")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 4, 8]))
def test_padding_repeats_the_border(height, width, multiple):
    x = np.random.default_rng(0).random((height, width))
    padded = pad_to_multiple(torch.tensor(x)[None, None], multiple)[0, 0].numpy()
    expected = np.pad(x, ((0, -height % multiple), (0, -width % multiple)), mode="edge")
    assert np.array_equal(padded, expected)
