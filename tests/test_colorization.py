"""Colorization: the bins of chroma, the prior, the loss, the metrics, and both kinds of answer."""

import importlib.util
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import densectx
from densectx.data.reader import read_image
from densectx.errors import ConfigError, DataError
from densectx.losses.chroma import ChromaCrossEntropy
from densectx.metrics import psnr, quantize
from densectx.metrics.colour import ColourMetrics, auc_share, colourfulness
from densectx.model import DenseModel
from densectx.nn.ab_bins import BINS, AbBins, _tables, centres
from densectx.nn.ab_prior import SHIPPED, AbPrior
from densectx.nn.colour import lab_to_rgb, rgb_to_lab
from densectx.rng import generator
from densectx.tasks.chroma import Bins
from densectx.types import SourceInfo

RGB = SourceInfo()
ROOT = Path(__file__).parents[1]


def build(**task):
    torch.manual_seed(0)
    tasks = {"t": {"name": "colorization", "source": "s", **task}}
    config = {"backbone": {"name": "plain", "width": 4}, "projection": None, "context": "none", "tasks": tasks}
    return DenseModel.from_config(config, {"s": RGB})


def batch(image, gray=False):
    n = len(image)
    return {"image": image, "gray": torch.tensor([gray] * n), "key": torch.tensor([[0, i] for i in range(n)])}


def prepared(model, samples):
    return model.task("t").prepare(samples, [generator("test", i) for i in range(len(samples["image"]))])


def pixels(image):
    return rgb_to_lab(image)[:, 1:].movedim(1, -1).reshape(-1, 2)


def picture(ab, image):
    """An image with other chroma, (N, 2)."""
    lab = rgb_to_lab(image)
    chroma = ab.T.reshape(1, 2, *image.shape[-2:])
    return lab_to_rgb(torch.cat([lab[:, :1], chroma.to(lab)], 1))


def photographs():
    data = pytest.importorskip("skimage.data")
    found = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    return torch.stack([torch.tensor(np.ascontiguousarray(f[:256, :256])).permute(2, 0, 1) / 255 for f in found])


# bins ----------------------------------------------------------------------------------------------------------------


def test_the_bins_cover_every_colour_of_srgb():
    assert BINS == 313
    assert centres().shape == (313, 2)
    assert len({tuple(c) for c in centres().tolist()}) == 313
    axis = torch.linspace(0, 1, 52)
    cube = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).reshape(1, 3, 52, -1)
    distance = AbBins().nearest(pixels(cube))[1].max().sqrt().item()
    assert distance == pytest.approx(7.06, abs=0.01)


def test_fifty_two_bins_hold_no_colour_of_8_bit_srgb():
    """What the surface of the cube reaches is all that the cube reaches."""
    axis, occupied = torch.arange(256) / 255, set()
    for channel in range(3):
        for value in (0.0, 1.0):
            face = torch.stack([*torch.meshgrid(axis, axis, indexing="ij"), torch.full((256, 256), value)])
            colours = face[[[2, 0, 1], [0, 2, 1], [0, 1, 2]][channel]]
            occupied |= set(AbBins().nearest(pixels(colours[None]))[0].flatten().tolist())
    assert len(occupied) == 313 - 52


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 5]))
def test_nearest_bins_equal_brute_force(seed, count):
    rng = torch.Generator().manual_seed(seed)
    ab = (torch.rand(500, 2, generator=rng, dtype=torch.float64) - 0.5) * 256
    ab[:100] = (ab[:100] / 4).round() * 4  # edges of the table's cells, and ties
    index, distance = AbBins().nearest(ab, count)
    every = (ab[:, None] - centres().double()).square().sum(2)
    assert torch.allclose(distance, every.topk(count, 1, largest=False).values, atol=1e-9)
    assert torch.equal(distance, every.gather(1, index))
    assert all(len(set(row)) == count for row in index.tolist())


def test_nearest_bins_in_chunks_and_of_none():
    ab = (torch.rand(300_000, 2) - 0.5) * 200
    index, _ = AbBins().nearest(ab, 5)
    assert torch.equal(index[140_000:140_100], AbBins().nearest(ab[140_000:140_100], 5)[0])
    assert AbBins().nearest(ab[:0], 5)[0].shape == (0, 5)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.998])
def test_averages_and_casts_of_weights_leave_the_bins_alone(decay, count):
    """Both go over buffers: whole numbers would be rounded, infinite ones become none at all."""
    ab = torch.rand(500, 2) * 200 - 100
    expected = AbBins().nearest(ab, count)
    averaged = AveragedModel(AbBins(), multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(5):
        averaged.update_parameters(AbBins())
    for bins in (averaged.module, AbBins().to(torch.bfloat16)):
        for value, other in zip(bins.nearest(ab, count), expected, strict=True):
            assert torch.equal(value, other)


def test_a_table_made_in_inference_mode_serves_training():
    ab = torch.rand(6, 2)
    _tables.cache_clear()
    with torch.inference_mode():
        AbBins().nearest(ab, 5)
    scores = torch.randn(6, BINS, requires_grad=True)
    index, share = AbBins().encode(ab)
    (share * scores.gather(1, index)).sum().backward()
    assert scores.grad is not None


def test_encoding_of_a_centre_in_closed_form():
    """Its own bin and four at distance 10: 1 : e^-2."""
    index, weight = AbBins().encode(torch.tensor([[0.0, 0.0]]))
    near = math.exp(-2) / (1 + 4 * math.exp(-2))
    assert weight[0].tolist() == pytest.approx([1 / (1 + 4 * math.exp(-2)), *[near] * 4])
    assert sorted(map(tuple, centres()[index[0]].tolist())) == [(-10, 0), (0, -10), (0, 0), (0, 10), (10, 0)]


def test_annealed_mean_goes_from_the_mean_to_the_mode():
    rng = torch.Generator().manual_seed(0)  # two bins of nearly the same height would need a lower temperature still
    bins, logits = AbBins(), torch.randn(2, BINS, 3, 4, dtype=torch.float64, generator=rng)
    share = logits.softmax(1).movedim(1, -1).numpy()
    places = centres().double().numpy()
    annealed = np.exp(np.log(share) / 0.38)  # equation 5
    expected = annealed @ places / annealed.sum(-1, keepdims=True)
    assert np.allclose(bins.decode(logits, 0.38).movedim(1, -1).numpy(), expected)
    assert np.allclose(bins.decode(logits, 1.0).movedim(1, -1).numpy(), share @ places)
    assert np.allclose(bins.decode(logits, 1e-4).movedim(1, -1).numpy(), places[share.argmax(-1)])


def test_ceilings_on_set5_are_the_published_ones(data_root):
    """RGB PSNR of 8-bit answers: nearest bin 35.40, soft mean of 5 bins 57.2, gray 18.02."""
    bins, found = AbBins(), []
    for file in sorted((data_root / "set5").glob("*_GT.bmp")):
        image = read_image(file)[0][None]
        ab = pixels(image)
        index, weight = bins.encode(ab)
        places = centres()[index]
        answers = [places[:, 0], (weight[..., None] * places).sum(1), torch.zeros_like(ab)]
        found.append([psnr(quantize(picture(answer, image)), image).item() for answer in answers])
    nearest, soft, gray = np.mean(found, 0)
    assert nearest == pytest.approx(35.40, abs=0.02)
    assert soft == pytest.approx(57.2, abs=0.05)
    assert gray == pytest.approx(18.02, abs=0.02)


# prior ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rebalance", [0.0, 0.5, 0.9, 1.0])
def test_weights_have_mean_one_under_the_prior(rebalance):
    prior = AbPrior()
    weights = prior.weights(rebalance).numpy()
    assert weights @ prior.smoothed == pytest.approx(1)
    assert (weights > 0).all()
    expected = 1 / (rebalance * prior.smoothed + (1 - rebalance) / 313)
    assert np.allclose(weights / weights[0], expected / expected[0])
    if rebalance:  # rare colours weigh more
        assert weights[prior.smoothed.argmin()] == weights.max() > 1 > weights[prior.smoothed.argmax()]
    else:
        assert np.allclose(weights, 1)


def test_prior_is_a_smoothed_distribution(tmp_path):
    assert AbPrior().smoothed.sum() == pytest.approx(1)
    middle = (centres() == 0).all(1).nonzero().item()
    counts = [0] * BINS
    counts[middle] = 10**12
    (tmp_path / "one.json").write_text(json.dumps({"counts": counts}))
    one = AbPrior(str(tmp_path / "one.json"))
    assert one.mean == (0, 0)
    distance = centres().double().square().sum(1).numpy()
    gauss = np.exp(-distance / 50)
    assert np.allclose(one.smoothed, gauss / gauss.sum(), atol=1e-8)


@pytest.mark.parametrize(
    "text",
    [None, "{", "[]", '{"counts": [1, 2]}', json.dumps({"counts": [-1] * 313}), json.dumps({"counts": [0] * 313})],
)
def test_a_prior_that_is_none_is_refused(tmp_path, text):
    file = tmp_path / "prior.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=r"prior\.json"):
        _ = AbPrior(file).counts


def test_the_shipped_prior_counts_the_pixels_it_says(data_root):
    """A few of its files: no bin has more pixels than the whole, and the whole is 400 files of 481 x 321."""
    shipped = json.loads(SHIPPED.read_text())
    assert sum(shipped["counts"]) == 400 * 481 * 321
    assert shipped["images"] == 400
    folders = [data_root.joinpath("bsds500", *folder.split("/")[1:]) for folder in shipped["folders"]]
    files = [file for folder in folders for file in sorted(folder.glob("*.jpg"))]
    assert len(files) == 400
    part = np.zeros(BINS)
    for file in files[::40]:
        index, _ = AbBins().nearest(pixels(read_image(file)[0][None]))
        part += np.bincount(index[:, 0].numpy(), minlength=BINS)
    assert (part <= shipped["counts"]).all()
    share, whole = part / part.sum(), np.array(shipped["counts"]) / sum(shipped["counts"])
    assert np.abs(share - whole).sum() < 0.7  # of at most 2; 10 of 400 images


def test_counting_is_nearest_bins_of_all_colour_files(tmp_path):
    spec = importlib.util.spec_from_file_location("ab_prior_script", ROOT / "benchmarks" / "ab_prior.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 256, (9, 11), np.uint8)).save(tmp_path / "gray.png")
    assert script.main([str(tmp_path), "-o", str(tmp_path / "prior.json")]) == 0
    found = json.loads((tmp_path / "prior.json").read_text())
    assert found["images"] == 1
    ab = pixels(read_image(tmp_path / "a.png")[0][None])
    expected = np.bincount(torch.cdist(ab, centres()).argmin(1).numpy(), minlength=BINS)
    assert found["counts"] == expected.tolist()
    assert AbPrior(tmp_path / "prior.json").counts.sum() == 99


# loss ----------------------------------------------------------------------------------------------------------------


def random_ab(*shape, dtype=torch.float32):
    ab = (torch.rand(shape[0], 2, *shape[1:], dtype=dtype) - 0.5) * 160
    ab[0, :, 0] = torch.nan
    return ab


@pytest.mark.parametrize("rebalance", [0.0, 0.5])
def test_loss_equals_dense_cross_entropy(rebalance):
    logits, ab = torch.randn(2, BINS, 5, 4), random_ab(2, 5, 4)
    total, weight = ChromaCrossEntropy(AbPrior(), rebalance)(logits, ab)["chroma_cross_entropy"]
    known = ~ab.isnan().any(1)
    scores, colours = logits.movedim(1, -1)[known], ab.movedim(1, -1)[known]
    distance = torch.cdist(colours, centres()).square()
    kept = distance.topk(5, 1, largest=False).indices
    dense = torch.zeros_like(distance).scatter(1, kept, (-distance.gather(1, kept) / 50).exp())
    dense = dense / dense.sum(1, keepdim=True)
    terms = F.cross_entropy(scores, dense, reduction="none")
    weights = AbPrior().weights(rebalance).float()[distance.argmin(1)]
    assert total.item() == pytest.approx((weights * terms).sum().item(), rel=1e-5)
    assert weight.item() == pytest.approx(weights.sum().item(), rel=1e-5)
    assert total.dtype == weight.dtype == torch.float32


def test_loss_of_no_idea_is_the_logarithm_of_313():
    total, weight = ChromaCrossEntropy(AbPrior())(torch.zeros(1, BINS, 6, 6), random_ab(1, 6, 6))[
        "chroma_cross_entropy"
    ]
    assert (total / weight).item() == pytest.approx(math.log(313), rel=1e-6)


@pytest.mark.fault("N06")
def test_loss_gradient():
    ab = random_ab(2, 1, 1, dtype=torch.float64)
    loss = ChromaCrossEntropy(AbPrior())
    logits = torch.randn(2, BINS, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss(z, ab)["chroma_cross_entropy"][0], logits, fast_mode=True)


def test_loss_adds_up_over_ranks_and_is_zero_without_labels():
    loss = ChromaCrossEntropy(AbPrior())
    logits, ab = torch.randn(4, BINS, 5, 4, dtype=torch.float64, requires_grad=True), random_ab(4, 5, 4)
    ab[1] = torch.nan
    whole = loss(logits, ab)["chroma_cross_entropy"]
    parts = [loss(logits[i : i + 1], ab[i : i + 1])["chroma_cross_entropy"] for i in range(4)]
    for one, some in zip(whole, zip(*parts, strict=True), strict=True):
        assert one.item() == pytest.approx(sum(some).item(), rel=1e-9)
    total, weight = parts[1]
    assert total.item() == weight.item() == 0
    (gradient,) = torch.autograd.grad(total, logits)
    assert not gradient.any()


def test_loss_survives_a_prior_first_read_without_gradients():
    """Validation comes first in a run, in inference mode."""
    prior = AbPrior()
    loss = ChromaCrossEntropy(prior)
    metrics = ColourMetrics(prior)
    with torch.inference_mode():
        lab = rgb_to_lab(torch.rand(1, 3, 4, 4))
        metrics.update(lab, lab)
    logits = torch.randn(1, BINS, 5, 4, requires_grad=True)
    loss(logits, random_ab(1, 5, 4))["chroma_cross_entropy"][0].backward()
    assert logits.grad.any()


# metrics -------------------------------------------------------------------------------------------------------------


def brute_auc(distance, weight):
    curve = [(weight * (distance <= t)).sum() / weight.sum() for t in range(151)]
    return 100 * sum((a + b) / 2 for a, b in pairwise(curve)) / 150


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 200) | st.sampled_from([0.0, 1.0, 149.0, 150.0, 151.0]), min_size=1, max_size=40))
def test_area_under_the_curve_equals_brute_force(distances):
    distance = np.array(distances)
    expected = brute_auc(distance, np.ones(len(distance)))
    assert 100 * auc_share(torch.tensor(distance)).mean().item() == pytest.approx(expected)


def numpy_colourfulness(rgb, absolute):
    r, g, b = (rgb * 255).astype(np.float64)
    rg, yb = r - g, 0.5 * (r + g) - b
    if absolute:
        rg, yb = np.abs(rg), np.abs(yb)
    return np.sqrt(np.std(rg) ** 2 + np.std(yb) ** 2) + 0.3 * np.sqrt(np.mean(rg) ** 2 + np.mean(yb) ** 2)


@pytest.mark.parametrize("absolute", [False, True])
def test_colourfulness_equals_numpy(absolute):
    images = torch.rand(3, 3, 16, 12)
    known = torch.rand(3, 16, 12) > 0.3
    whole, part = colourfulness(images, absolute=absolute), colourfulness(images, known, absolute=absolute)
    for i in range(3):
        assert whole[i].item() == pytest.approx(numpy_colourfulness(images[i].numpy(), absolute), rel=1e-5)
        some = images[i][:, known[i]].numpy()
        assert part[i].item() == pytest.approx(numpy_colourfulness(some, absolute), rel=1e-5)
    assert colourfulness(torch.full((1, 3, 4, 4), 0.3)).item() == pytest.approx(0, abs=1e-3)


def test_colourfulness_of_set5_is_the_published_one(data_root):
    for name, signed, absolute in (("bird", 79.418, 74.035), ("baby", 55.351, 54.911), ("head", 49.810, 43.891)):
        image = read_image(data_root / "set5" / f"{name}_GT.bmp")[0][None]
        assert colourfulness(image).item() == pytest.approx(signed, abs=2e-3)
        assert colourfulness(image, absolute=True).item() == pytest.approx(absolute, abs=2e-3)


def test_metrics_against_their_definitions():
    torch.manual_seed(0)
    truth, answer = rgb_to_lab(torch.rand(2, 3, 8, 6)), rgb_to_lab(torch.rand(2, 3, 8, 6))
    prior = AbPrior()
    whole, parts = ColourMetrics(prior), ColourMetrics(prior)
    whole.update(answer, truth)
    for i in range(2):
        parts.update(answer[i : i + 1], truth[i : i + 1])
    values = whole.compute()
    for name, value in parts.compute().items():
        assert value.item() == pytest.approx(values[name].item(), rel=1e-6, abs=1e-5), name  # a gray one's are rounding
    gray = torch.cat([truth[:, :1], torch.zeros_like(truth[:, 1:])], 1)
    mean = torch.cat([truth[:, :1], torch.tensor(prior.mean).view(1, 2, 1, 1).expand(2, -1, 8, 6)], 1)
    true_ab = truth[:, 1:].movedim(1, -1).reshape(-1, 2)
    weights = prior.weights(1.0).numpy()[torch.cdist(true_ab, centres()).argmin(1).numpy()]
    for suffix, lab in (("", answer), ("_gray", gray), ("_mean", mean)):
        assert values[f"ab_psnr{suffix}"] == pytest.approx(
            psnr(lab[:, 1:], truth[:, 1:], 255.0).mean().item(), rel=1e-5
        )
        assert values[f"psnr{suffix}"] == pytest.approx(
            psnr(lab_to_rgb(lab), lab_to_rgb(truth)).mean().item(), rel=1e-5
        )
        assert values[f"colourfulness{suffix}"] == pytest.approx(
            colourfulness(lab_to_rgb(lab)).mean().item(), rel=1e-5, abs=1e-5
        )
        distance = (lab - truth)[:, 1:].norm(dim=1).flatten().numpy()
        assert values[f"auc{suffix}"] == pytest.approx(brute_auc(distance, np.ones(96)), rel=1e-5)
        assert values[f"auc_rebalanced{suffix}"] == pytest.approx(brute_auc(distance, weights), rel=1e-5)
    assert values["colourfulness_truth"] == pytest.approx(colourfulness(lab_to_rgb(truth)).mean().item(), rel=1e-5)
    perfect = ColourMetrics(prior)
    perfect.update(truth, truth)
    assert perfect.compute()["auc"] == perfect.compute()["auc_rebalanced"] == 100


def test_metrics_pass_over_what_is_unlabelled():
    truth, answer = rgb_to_lab(torch.rand(2, 3, 8, 6)), rgb_to_lab(torch.rand(2, 3, 8, 6))
    cropped, padded = ColourMetrics(AbPrior()), ColourMetrics(AbPrior())
    cropped.update(answer[:1, :, :5], truth[:1, :, :5])
    truth[0, 1:, 5:], truth[1, 1:] = torch.nan, torch.nan
    padded.update(answer, truth)
    assert padded.count.item() == 1
    for name, value in cropped.compute().items():
        assert padded.compute()[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name
    nothing = ColourMetrics(AbPrior())
    nothing.update(answer[1:], truth[1:])
    assert all(value.isnan() for value in nothing.compute().values())


# the task ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (17, 30), (32, 32)])
@pytest.mark.parametrize("stride", [1, 4, 5])
def test_bins_answer_at_every_size(size, stride):
    model = build(target="bins", stride=stride, width=8)
    samples = batch(torch.rand(2, 3, *size))
    x, target = prepared(model, samples)
    output = model({"t": x})["t"]
    assert output.shape == (2, 8, *size)
    total, weight = model.task("t").loss(output, target)["chroma_cross_entropy"]
    assert torch.isfinite(total)
    assert weight > 0
    assert model.predict(samples["image"])["t"].shape == (2, 3, *size)


def test_cells_are_means_of_their_labelled_pixels():
    ab = torch.randn(1, 2, 6, 7)
    ab[:, :, 0, :3], ab[:, :, 4:, :4] = torch.nan, torch.nan
    logits, mean = Bins(stride=4, width=3).compared(torch.randn(1, 3, 6, 7), ab)
    assert logits.shape == (1, BINS, 2, 2)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cell = ab[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1).numpy()
        if np.isnan(cell).all():
            assert mean[0, :, row, column].isnan().all()
        else:
            assert np.allclose(mean[0, :, row, column].numpy(), np.nanmean(cell, 1), atol=1e-5)


def test_logits_of_cells_are_the_mean_of_logits_of_pixels():
    chroma, output = Bins(stride=4, width=6), torch.randn(1, 6, 9, 10)
    with torch.no_grad():
        expected = F.avg_pool2d(chroma.classifier(output), 4, ceil_mode=True, count_include_pad=False)
        assert torch.allclose(chroma.logits(output), expected, atol=1e-5)


@pytest.mark.parametrize("border", [1, 2, 4, 7])
def test_cells_begin_inside_surroundings(border):
    """Whatever is around an interior, even one that is no multiple of cells, its loss is that of itself alone."""
    task = build(target="bins").task("t")
    image = torch.rand(2, 3, 10, 13)
    _, alone = task.prepare(batch(image), [])
    around = (border,) * 4
    valid = F.pad(torch.ones(2, 10, 13, dtype=torch.bool), around)
    samples = {**batch(F.pad(image, around, mode="reflect")), "valid": valid}
    _, inside = task.prepare({**samples, "surround": torch.tensor([border] * 2)}, [])
    output = torch.randn(2, task.chroma.channels, 10, 13)
    expected, found = task.loss(output, alone), task.loss(F.pad(output, around, value=9.0), inside)
    assert {k: torch.stack(v).tolist() for k, v in found.items()} == {
        k: pytest.approx(torch.stack(v).tolist()) for k, v in expected.items()
    }


def test_a_certain_network_answers_with_the_colour_of_its_bin():
    model = build(target="bins", width=8)
    classifier = model.task("t").chroma.classifier
    with torch.no_grad():
        classifier.weight.zero_()
        classifier.bias.zero_()
        classifier.bias[(centres() == torch.tensor([20.0, 30.0])).all(1)] = 100
    image = torch.full((3, 13, 10), 0.4)
    lab = rgb_to_lab(model.predict(image)["t"][None])
    assert torch.allclose(lab[:, 1], torch.tensor(20.0), atol=0.05)
    assert torch.allclose(lab[:, 2], torch.tensor(30.0), atol=0.05)
    assert torch.allclose(lab[:, 0], rgb_to_lab(image[None])[:, 0], atol=0.05)


@pytest.mark.parametrize("target", ["regression", "bins"])
def test_gray_files_and_padding_are_unlabelled(target):
    model = build(target=target)
    task = model.task("t")
    samples = batch(torch.rand(3, 3, 8, 8))
    samples["gray"][1] = True
    samples["valid"] = torch.ones(3, 8, 8, dtype=torch.bool)
    samples["valid"][2, 4:] = False
    x, target_of = prepared(model, samples)
    known = ~target_of["ab"].isnan().any(1)
    assert torch.equal(known, samples["valid"] & ~samples["gray"].view(-1, 1, 1))
    other = {**samples, "image": samples["image"].clone()}
    other["image"][1] = samples["image"][1].mean(0)  # colours that may not count
    output = model({"t": x})["t"].detach()
    (name,) = task.coefficients
    first = task.loss(output, target_of)[name]
    second = task.loss(output, prepared(model, other)[1])[name]
    assert torch.equal(torch.stack(first), torch.stack(second))
    task.update(task.postprocess(output, x), x, target_of)
    assert task.metrics.count.item() == 2
    nothing = {"ab": torch.full_like(target_of["ab"], torch.nan)}
    assert [value.item() for value in task.loss(output, nothing)[name]] == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "bin"}, "'regression' or 'bins'"),
        ({"stride": 4}, "stride is for target bins"),
        ({"rebalance": 0.5}, "rebalance is for target bins"),
        ({"target": "bins", "loss": "l1"}, "its own loss"),
        ({"target": "bins", "stride": 0}, "stride 0"),
        ({"target": "bins", "temperature": 0.0}, r"temperature 0\.0"),
        ({"target": "bins", "rebalance": 1.0}, r"rebalance 1\.0"),
        ({"target": "bins", "width": -1}, "width -1"),
        ({"loss": "cross_entropy"}, "cross_entropy"),
        ({"prior": 3}, "prior"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_a_model_predicts_without_its_prior_but_does_not_train(tmp_path):
    model = build(target="bins", prior=str(tmp_path / "gone.json"))
    image = torch.rand(2, 3, 8, 8)
    assert model.predict(image)["t"].isfinite().all()
    x, target = prepared(model, batch(image))
    with pytest.raises(DataError, match=r"gone\.json"):
        model.task("t").loss(model({"t": x})["t"], target)


@pytest.mark.parametrize("start", ["fit", "validate", "test"])
def test_a_prior_that_is_missing_is_noticed_before_the_first_batch(tmp_path, start):
    """A regression asks for it in its metrics only, long after the start of its training."""
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    class Asked(Exception):
        pass

    class Data:
        def __iter__(self):
            raise Asked

    for prior, refusal in ((str(tmp_path / "gone.json"), DataError), (None, Asked)):
        module = densectx.DenseModule(build(prior=prior), torch.optim.SGD)
        trainer = pl.Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, **options)
        with pytest.raises(refusal):
            getattr(trainer, start)(module, Data())


def test_regression_has_no_state_of_bins():
    names = build().task("t").state_dict().keys()
    assert all(name.startswith("head.") for name in names)
    bins = build(target="bins").task("t").state_dict().keys()
    assert {name for name in bins if not name.startswith("head.")} == {
        "chroma.classifier.weight",
        "chroma.classifier.bias",
    }


def test_training_on_photographs_learns_colours():
    """A few dozen steps on four photographs: from log 313 well down, and nearer to the truth than gray."""
    model = build(target="bins", width=32, stride=2, head={"name": "decoder", "width": 16})
    images = F.interpolate(photographs(), (32, 32), mode="area")
    task, samples = model.task("t"), batch(images)
    x, target = prepared(model, samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(80):
        total, weight = task.loss(model({"t": x})["t"], target)["chroma_cross_entropy"]
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        values.append((total / weight).item())
    assert values[0] == pytest.approx(math.log(313), rel=0.1)
    assert values[-1] < 0.6 * values[0]
    model.eval()
    with torch.no_grad():
        task.update(task.postprocess(model({"t": x})["t"], x), x, target)
    found = task.metrics.compute()
    for name in ("auc", "auc_rebalanced", "ab_psnr"):
        assert found[name] > found[f"{name}_gray"] + 1
    assert found["colourfulness"] > 0.3 * found["colourfulness_truth"]


def test_quantised_psnr_is_near():
    """The metric does not round: 8-bit rounding moves it by hundredths of a dB."""
    image = torch.rand(1, 3, 32, 32)
    answer = picture(torch.zeros(1024, 2), image)
    assert psnr(answer, image).item() == pytest.approx(psnr(quantize(answer), quantize(image)).item(), abs=0.05)
