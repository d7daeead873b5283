"""Restoration tasks: published baselines, degradations against references, SSIM, noise estimates, CutBlur, padding."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.metrics import ssim as kornia_ssim
from PIL import Image
from skimage.metrics import structural_similarity

from densectx.checkpoint import save_safetensors
from densectx.cli import main
from densectx.data.reader import read_image
from densectx.errors import ConfigError, DataError
from densectx.losses.ssim import SSIM
from densectx.metrics.ssim import ssim, ssim_map
from densectx.model import DenseModel
from densectx.nn.bayer import PATTERNS, bilinear, mosaic, sites
from densectx.nn.noise import noise_level, signal_noise
from densectx.nn.resize import bicubic
from densectx.rng import generator
from densectx.tasks.jpeg_deblocking import jpeg
from densectx.tasks.restoring import cutblur
from densectx.types import SourceInfo

RGB = SourceInfo()
GRAY = SourceInfo(channels=1)
PAIRS = SourceInfo(keys=("image", "target"), target="image")
DOUBLED = SourceInfo(keys=("image", "target"), target="image", scale=2)


def build(name, info=RGB, in_channels=None, width=4, **options):
    torch.manual_seed(0)
    config = {
        "backbone": {"name": "plain", "width": width, "in_channels": in_channels or info.channels},
        "projection": None,
        "context": "none",
        "tasks": {"t": {"name": name, "source": "s", **options}},
    }
    return DenseModel.from_config(config, {"s": info})


def batch(image, gray=False, **more):
    n = len(image)
    return {"image": image, "gray": torch.tensor([gray] * n), **more}


def rngs(n, seed="test"):
    return [generator(seed, i) for i in range(n)]


def noise(seed):
    return torch.Generator().manual_seed(seed)


def smooth(seed=0, size=(40, 48), channels=3, count=1):
    """Random pictures with structure."""
    coarse = torch.rand(count, channels, 5, 6, generator=noise(seed))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)


# ---- SSIM


@pytest.mark.fault("N07")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ssim_agrees_with_scikit_image_and_kornia(channels, dtype):
    x = smooth(1, (37, 52), channels, 2).to(dtype)
    y = (x + 0.1 * torch.randn(x.shape, generator=noise(2), dtype=dtype)).clamp(0, 1)
    found = ssim_map(x, y)
    assert found.shape == (2, channels, 27, 42)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for i in range(2):
        for c in range(channels):
            _, full = structural_similarity(x[i, c].numpy(), y[i, c].numpy(), full=True, **options)
            inside = torch.from_numpy(np.ascontiguousarray(full[5:-5, 5:-5]))
            torch.testing.assert_close(found[i, c], inside, atol=5e-5 if dtype == torch.float32 else 1e-10, rtol=0)
    other = kornia_ssim(x, y, 11, padding="valid")
    torch.testing.assert_close(found, other, atol=2e-4 if dtype == torch.float32 else 1e-6, rtol=0)
    torch.testing.assert_close(ssim(x, y), found.flatten(1).mean(1))
    torch.testing.assert_close(ssim(x * 255, y * 255, 255.0), ssim(x, y), atol=1e-5, rtol=0)


def test_ssim_has_no_operation_that_a_gpu_may_do_in_tf32():
    x, y = torch.rand(2, 1, 3, 16, 16, generator=noise(0))
    with torch.autograd.profiler.profile() as profile:
        SSIM()(x.requires_grad_(), y)[0].backward()
    names = {event.name for event in profile.function_events}
    assert "aten::add" in names
    assert not [name for name in names if "conv" in name or "mm" in name or "linear" in name]


def test_ssim_of_constants_is_the_closed_form():
    a, b, c1 = 0.3, 0.8, 0.01**2
    x, y = torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b)
    assert ssim(x, y).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 99))
def test_ssim_is_defined_at_every_size_one_for_equals_and_symmetric(height, width, seed):
    x, y = torch.rand(2, 1, 2, height, width, generator=noise(seed), dtype=torch.float64)
    assert ssim(x, x).item() == pytest.approx(1, abs=1e-12)
    assert ssim(x, y).item() == pytest.approx(ssim(y, x).item(), abs=1e-9)
    assert ssim(x, y).item() <= 1


def test_ssim_loss_is_a_mean_over_images_of_windows_without_nan():
    x, y = torch.rand(2, 3, 3, 24, 30, generator=noise(0))
    total, weight = SSIM()(x, y)
    assert weight.item() == 3
    assert total.item() == pytest.approx((1 - ssim(x, y)).sum().item(), abs=1e-5)
    hidden = y.clone()
    hidden[0, :, :, 17:] = math.nan  # padding at the right
    hidden[1] = math.nan
    output = x.clone().requires_grad_()
    total, weight = SSIM()(output, hidden)
    expected = (1 - ssim(x[:1, :, :, :17], y[:1, :, :, :17])) + (1 - ssim(x[2:], y[2:]))
    assert weight.item() == 2
    assert total.item() == pytest.approx(expected.item(), abs=1e-5)
    total.backward()
    assert output.grad.isfinite().all()
    assert not output.grad[0, :, :, 17:].any()
    assert not output.grad[1].any()


@pytest.mark.fault("N06")
def test_ssim_loss_has_the_right_gradient():
    x, y = torch.rand(2, 1, 1, 13, 12, generator=noise(0), dtype=torch.float64)
    y[..., 0, 0] = math.nan
    assert torch.autograd.gradcheck(lambda z: SSIM()(z, y)[0], x.requires_grad_())


# ---- super-resolution


@pytest.mark.parametrize(("scale", "psnr", "similarity"), [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)])
def test_bicubic_baseline_of_super_resolution_is_the_published_one(data_root, scale, psnr, similarity):
    """Set5 on luma; without antialiasing x2 would read 34.45 dB."""
    files = sorted((data_root / "set5").glob("*_GT.bmp"))
    assert len(files) == 5
    for upsampling, info in (("post", RGB), ("pre", RGB), ("post", GRAY)):
        model = build("super_resolution", info, scale=scale, upsampling=upsampling, head="linear").eval()
        task = model.task("t")
        for file in files:
            image, gray = read_image(file, info.channels)
            x, target = task.prepare(batch(image[None], gray), rngs(1))
            answer = bicubic(x, up=scale // task.input_scale)  # what an untrained residual network answers
            task.update(answer, x, target)
        values = task.metrics.compute()
        assert values["psnr_bicubic"].item() == pytest.approx(psnr, abs=0.05)
        assert values["ssim_bicubic"].item() == pytest.approx(similarity, abs=0.001)
        assert values["psnr"].item() == pytest.approx(values["psnr_bicubic"].item(), abs=1e-6)
        assert task.convention == f"Y, crop {scale}, per image, peak 255"


def test_one_channel_is_measured_on_the_luma_of_the_colours_that_it_was_made_of(tmp_path):
    image = (3 * smooth()[0] + torch.rand(3, 40, 48, generator=noise(1))) / 4
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "gray.png")
    read = {}
    for name, info in (("colour", RGB), ("colour", GRAY), ("gray", RGB), ("gray", GRAY)):
        task = build("super_resolution", info).eval().task("t")
        image, gray = read_image(tmp_path / f"{name}.png", info.channels)
        x, target = task.prepare(batch(image[None], gray), rngs(1))
        task.update(bicubic(x, up=2), x, target)
        read[name, info.channels] = task.metrics.compute()["psnr"].item()
    assert read["colour", 1] == pytest.approx(read["colour", 3], abs=0.02)  # but for where it is rounded
    assert read["gray", 1] == pytest.approx(read["gray", 3], abs=1e-4)
    assert read["colour", 1] - read["gray", 1] == pytest.approx(20 * math.log10(255 / 219), abs=0.02)


def test_the_luma_of_the_truth_is_not_rounded():
    task = build("super_resolution", GRAY).eval().task("t")
    x, target = task.prepare(batch(smooth(channels=1)), rngs(1))
    answer = (target["image"] * 255).round() / 255
    task.update(answer, x, target)
    error = (219 / 255 * (answer - target["image"]))[..., 2:-2, 2:-2]
    expected = -10 * error.square().mean().log10().item()
    assert task.metrics.compute()["psnr"].item() == pytest.approx(expected, abs=1e-3)


def test_the_answer_to_a_gray_file_is_measured_as_predict_writes_it():
    """All of its channels: red alone says nothing of the others."""
    task = build("super_resolution").eval().task("t")
    x, target = task.prepare(batch(smooth(channels=1).expand(1, 3, -1, -1), gray=True), rngs(1))
    answer = bicubic(x, up=2)
    answer = answer + torch.tensor([0.0, 0.1, -0.1]).view(1, 3, 1, 1)
    task.update(answer, x, target)
    written = (0.299 * answer[:, 0] + 0.587 * answer[:, 1] + 0.114 * answer[:, 2]).clamp(0, 1)
    error = ((written * 255).round() / 255 - target["image"][:, 0])[..., 2:-2, 2:-2]
    assert task.metrics.compute()["psnr"].item() == pytest.approx(-10 * math.log10(error.square().mean()), abs=1e-3)


def test_the_enlarged_input_gives_an_answer_of_the_same_size():
    post, pre = (build("super_resolution", scale=3, upsampling=where).eval() for where in ("post", "pre"))
    image = torch.rand(2, 3, 7, 9, generator=noise(0))
    x, target = pre.task("t").prepare(batch(torch.rand(2, 3, 22, 29)), rngs(2))
    assert x.shape == target["image"].shape == (2, 3, 21, 27)
    assert pre({"t": x})["t"].shape == (2, 3, 21, 27)
    answers = [model.predict(image)["t"] for model in (post, pre)]
    for answer in answers:  # untrained: bicubic
        torch.testing.assert_close(answer, bicubic(image, up=3))
    assert build("super_resolution", GRAY, upsampling="pre").predict(image)["t"].shape == (2, 3, 14, 18)


def test_pairs_of_super_resolution_are_taken_as_they_are():
    model = build("super_resolution", DOUBLED, degradation="paired")
    task = model.task("t")
    assert task.requires == ("image", "target")
    small, large = torch.rand(2, 3, 8, 9), torch.rand(2, 3, 16, 18)
    large[1] = math.nan  # a sample without a target
    data = batch(small, target=large, valid=torch.ones(2, 8, 9, dtype=torch.bool))
    data["valid"][0, :, 6:] = False
    x, target = task.train().prepare(data, rngs(2))
    assert torch.equal(x, small)
    assert torch.equal(target["image"][0, :, :, :12], large[0, :, :, :12])
    assert target["image"][0, :, :, 12:].isnan().all()
    assert task.loss(model({"t": x})["t"], target)["l1"][1].item() == 3 * 16 * 12
    x, target = task.eval().prepare(batch(small, target=large), rngs(2))
    task.update(model({"t": x})["t"].detach(), x, target)
    assert task.metrics.count.item() == 1
    with pytest.raises(DataError, match=r"\(16, 18\).*\(14, 18\)"):
        task.prepare(batch(small[:, :, :7], target=large), rngs(2))
    with pytest.raises(ConfigError, match="1 channels, the image 3"):
        task.prepare(batch(small, target=large[:, :1]), rngs(2))


@pytest.mark.parametrize(
    ("name", "info", "options", "convention"),
    [
        ("denoising", GRAY, {"sigma": 50}, "sigma 50 not clipped, 8-bit gray, whole image, per image, peak 255"),
        ("demosaicing", RGB, {}, "8-bit RGB, crop 10, per image, peak 255"),
        ("jpeg_deblocking", GRAY, {"quality": 40}, "quality 40, 8-bit gray, whole image, per image, peak 255"),
        ("restoration", PAIRS, {}, "8-bit RGB, whole image, per image, peak 255"),
        ("super_resolution", RGB, {"scale": 4}, "Y, crop 4, per image, peak 255"),
    ],
)
def test_every_number_has_its_convention(name, info, options, convention):
    assert build(name, info, **options).task("t").convention == convention


@pytest.mark.parametrize(
    ("name", "info", "options", "message"),
    [
        ("super_resolution", DOUBLED, {"degradation": "paired", "scale": 3}, "2 times.*wants 3 times"),
        ("super_resolution", RGB, {"degradation": "paired"}, "'s' has no second picture"),
        ("super_resolution", RGB, {"upsampling": "before"}, "upsampling"),
        ("super_resolution", RGB, {"cutblur": 0.5}, "upsampling: pre"),
        ("restoration", DOUBLED, {}, "2 times.*wants 1 times"),
        ("restoration", SourceInfo(keys=("image", "target"), target="map"), {}, "its target is 'map'"),
        ("restoration", PAIRS, {"cutblur": 2.0}, "probability"),
        ("demosaicing", GRAY, {}, "1 channels"),
        ("demosaicing", RGB, {"pattern": "RGBG"}, "pattern"),
        ("jpeg_deblocking", RGB, {"quality": 0}, "quality 0"),
        ("jpeg_deblocking", RGB, {"quality": [40, 10]}, "quality"),
        ("jpeg_deblocking", RGB, {"test_quality": 101}, "test_quality"),
        ("denoising", RGB, {"blind": True}, "blind is for a range"),
        ("denoising", RGB, {"gain": 0.1}, "poisson_gaussian"),
        ("denoising", RGB, {"noise": "poisson_gaussian"}, "gain above 0"),
        ("denoising", RGB, {"noise": "poisson"}, "noise"),
        ("denoising", RGB, {"sigma": [0, 300]}, "sigma"),
        ("denoising", RGB, {"sigma": [0, 1, 2]}, "sigma"),
        ("denoising", RGB, {"loss": {"name": "ssim", "peak": 0}}, "peak"),
    ],
)
def test_impossible_tasks_are_refused(name, info, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, info, **options)


# ---- denoising


def test_a_blind_network_sees_all_levels_and_no_map():
    model = build("denoising", sigma=[0, 50], blind=True)
    task = model.task("t").train()
    image = torch.full((16, 3, 48, 48), 0.5)
    x, _ = task.prepare(batch(image), rngs(16))
    assert x.shape == image.shape
    levels = (x - image).flatten(1).std(1) * 255
    assert levels.min() < 15
    assert levels.max() > 35
    assert not task.options
    assert "sigma 25 not clipped, 8-bit RGB" in task.convention
    with pytest.raises(ConfigError, match=r"unknown option 't\.sigma'"):
        model.predict(image, options={"t.sigma": 3.0})


def test_poisson_gaussian_noise_has_the_stated_variance():
    task = build("denoising", noise="poisson_gaussian", sigma=5, gain=0.02).task("t").train()
    signals = torch.tensor([0.0, 0.25, 1.0])
    image = signals.view(3, 1, 1, 1).expand(3, 3, 128, 128).contiguous()
    x, _ = task.prepare(batch(image), rngs(3))
    expected = 0.02 * signals + (5 / 255) ** 2
    torch.testing.assert_close((x - image).flatten(1).var(1), expected, rtol=0.03, atol=0)


def test_the_map_of_poisson_gaussian_noise_is_its_deviation_at_the_noisy_value():
    model = build("denoising", in_channels=4, noise="poisson_gaussian", sigma=[0, 20], gain=[0.0, 0.05])
    task = model.task("t").eval()
    image = smooth(3, count=2)
    x, _ = task.prepare(batch(image), rngs(2))
    noisy = x[:, :3].mean(1).clamp(0, 1)
    torch.testing.assert_close(x[:, 3], (0.025 * noisy + (10 / 255) ** 2).sqrt())
    again = task.inputs(x[:, :3], {"sigma": 10.0, "gain": torch.tensor([0.025, 0.025])})
    torch.testing.assert_close(again, x)
    assert model.predict(image, options={"t.sigma": 10, "t.gain": 0.02})["t"].shape == image.shape
    assert set(model.resolve(image)) == {"t.sigma", "t.gain"}


@pytest.mark.parametrize("sigma", [2, 10, 40])
def test_noise_of_a_smooth_picture_is_found(sigma):
    clean = 0.3 + 0.4 * smooth(9, (240, 320), 3, 2)
    noisy = clean + torch.randn(clean.shape, generator=noise(sigma)) * sigma / 255
    found = noise_level(noisy) * 255
    assert found.shape == (2,)
    torch.testing.assert_close(found, torch.full((2,), float(sigma)), rtol=0.03, atol=0)
    torch.testing.assert_close(noise_level(noisy[1:]) * 255, found[1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(noise_level(noisy) * 255, found)


@pytest.mark.parametrize(("gain", "sigma"), [(0.02, 4.0), (0.0, 10.0), (0.01, 0.0)])
def test_the_two_parts_of_noise_are_found(gain, sigma):
    ramp = torch.linspace(0.1, 0.9, 320).expand(1, 1, 320, 320)
    clean = torch.cat([ramp, ramp.flip(-1)])
    deviation = (gain * clean + (sigma / 255) ** 2).sqrt()
    found, rest = signal_noise(clean + deviation * torch.randn(clean.shape, generator=noise(1)))
    for i in range(2):
        assert found[i].item() == pytest.approx(gain, abs=0.0015)
        estimate = (found[i] * clean[i] + rest[i] ** 2).sqrt()
        assert ((estimate - deviation[i]).abs() / deviation[i]).max() < 0.15


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("share", [0.5, 0.76, 0.8, 0.9])
def test_noise_beside_flat_black_or_white_is_found(level, share):
    clean = 0.3 + 0.4 * smooth(9, (256, 256))
    image = (clean + 25 / 255 * torch.randn(clean.shape, generator=noise(0))).clamp(0, 1)
    image[..., round(256 * (1 - share)) :, :] = level
    gain, sigma = signal_noise(image)
    for found in (noise_level(image), (gain * 0.5 + sigma**2).sqrt()):
        assert found.item() * 255 == pytest.approx(25, rel=0.05)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_every_image_has_an_estimate(height, width):
    for image in (torch.rand(2, 3, height, width), torch.zeros(2, 1, height, width), torch.ones(1, 1, height, width)):
        gain, sigma = signal_noise(image)
        for value in (noise_level(image), gain, sigma):
            assert value.shape == (len(image),)
            assert value.isfinite().all()
            assert (value >= 0).all()
    assert noise_level(torch.zeros(1, 3, height, width)).item() == 0


def test_noise_of_photographs_is_found(data_root):
    """Twelve pictures; the tolerances are about 1.3 times what is measured, see densectx/nn/noise.py."""
    files = sorted((data_root / "bsds500" / "images" / "val").glob("*.jpg"))[::5][:8]
    files += sorted((data_root / "set12").glob("*.png"))[:4]
    pictures = [read_image(file, 1)[0][None] for file in files]
    for sigma, mean, worst in ((5, 1.1, 6.0), (25, 0.7, 3.5), (50, 0.8, 3.0)):
        errors = []
        for number, clean in enumerate(pictures):
            noisy = clean + torch.randn(clean.shape, generator=noise(number)) * sigma / 255
            errors.append(abs(noise_level(noisy).item() * 255 - sigma))
        assert sum(errors) / len(errors) < mean
        assert max(errors) < worst


def test_a_level_that_is_not_given_is_estimated_for_each_image():
    model = build("denoising", sigma=[0, 50]).eval()
    torch.nn.init.normal_(model.task("t").head.exit.weight, std=0.3)
    clean = 0.3 + 0.4 * smooth(10, (96, 96), 3, 2)
    image = clean + torch.randn(clean.shape, generator=noise(0)) * torch.tensor([10, 30]).view(2, 1, 1, 1) / 255
    found = model.resolve(image)["t.sigma"]
    torch.testing.assert_close(found, torch.tensor([10.0, 30.0]), rtol=0.1, atol=0)
    answers = [model.predict(image, options=o)["t"] for o in (None, {"t.sigma": -1}, {"t.sigma": found})]
    answers.append(torch.stack([model.predict(one)["t"] for one in image]))
    answers.append(
        torch.stack(
            [model.predict(one, options={"t.sigma": s.item()})["t"] for one, s in zip(image, found, strict=True)]
        )
    )
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], atol=1e-5, rtol=1e-5)
    mixed = model.resolve(image, options={"t.sigma": torch.tensor([20.0, -1.0])})["t.sigma"]
    torch.testing.assert_close(mixed, torch.tensor([20.0, found[1].item()]))
    given = model.predict(image, options={"t.sigma": 25.0})["t"]
    assert (given - answers[0]).abs().max() > 1e-4
    assert model.resolve(image, options={"t.sigma": 25.0}) == {"t.sigma": 25.0}
    for wrong in (torch.rand(3), torch.rand(2, 1), 256.0, torch.tensor([3.0, 300.0]), math.nan):
        with pytest.raises(ConfigError, match=r"t\.sigma|sigma is"):
            model.predict(image, options={"t.sigma": wrong})


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_image_that_is_not_finite_is_not_blamed_on_the_level(wrong):
    model, image = build("denoising", sigma=[0, 50]).eval(), torch.full((3, 40, 40), wrong)
    with pytest.raises(ConfigError, match="sigma cannot be estimated: the image has values that are NaN or infinite"):
        model.predict(image)
    with pytest.raises(ConfigError, match="sigma is nan, expected 0 to 255"):
        model.predict(torch.rand(3, 40, 40), options={"t.sigma": math.nan})


def test_a_checkerboard_is_no_noise_beyond_the_scale():
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    image = board.float().expand(3, 64, 64)
    for options in ({"sigma": [0, 50]}, {"sigma": [0, 50], "noise": "poisson_gaussian", "gain": [0, 0.1]}):
        model = build("denoising", **options).eval()
        found = model.resolve(image)
        assert float(found["t.sigma"]) <= 255
        assert model.predict(image)["t"].isfinite().all()


def test_a_gray_model_has_one_estimate_for_the_channels_of_colour():
    model = build("denoising", GRAY, sigma=[0, 50]).eval()
    torch.nn.init.normal_(model.task("t").head.exit.weight, std=0.3)
    clean = 0.3 + 0.4 * smooth(11, (64, 80), 3, 2)
    image = clean + torch.randn(clean.shape, generator=noise(0)) * torch.tensor([10, 30]).view(2, 1, 1, 1) / 255
    found = model.resolve(image)["t.sigma"]
    by_channel = torch.stack([noise_level(image[:, c : c + 1]) for c in range(3)])
    torch.testing.assert_close(found, by_channel.mean(0) * 255)
    answer = model.predict(image)["t"]
    for c in range(3):
        alone = model.predict(image[:, c : c + 1], options={"t.sigma": found})["t"]
        torch.testing.assert_close(answer[:, c : c + 1], alone, atol=1e-5, rtol=1e-5)


def test_predict_says_and_records_what_it_estimated(tmp_path, capsys):
    save_safetensors(build("denoising", sigma=[0, 50]), tmp_path / "m.safetensors")
    noisy = 0.5 + 15 / 255 * torch.randn(96, 128, 3, generator=noise(0))
    Image.fromarray((noisy.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).save(tmp_path / "a.png")
    arguments = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "a.png"), "-o"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "estimated" in line]
    (entry,) = json.loads((tmp_path / "out" / "summary.json").read_text())["inputs"]
    assert entry["estimated"] == {"t.sigma": pytest.approx(15, rel=0.05)}
    assert lines == [f"densectx: {tmp_path / 'a.png'}: estimated t.sigma {entry['estimated']['t.sigma']:.4g}."]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    (again,) = json.loads((tmp_path / "out" / "summary.json").read_text())["inputs"]
    assert again == {**entry, "status": "skipped"}
    assert main([*arguments, str(tmp_path / "given"), "--set", "t.sigma=15"]) == 0
    (given,) = json.loads((tmp_path / "given" / "summary.json").read_text())["inputs"]
    assert "estimated" not in given
    assert main([*arguments, str(tmp_path / "negative"), "--set", "t.sigma=-1"]) == 0
    assert (tmp_path / "negative/t/a.png").read_bytes() == (tmp_path / "out/t/a.png").read_bytes()


# ---- demosaicing


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mosaic_has_one_colour_a_place(pattern):
    where = sites(pattern, 5, 6)[0]
    assert (where.sum(0) == 1).all()
    letters = ["RGB"[int(where[:, i, j].int().argmax())] for i in (0, 1) for j in (0, 1)]
    assert "".join(letters) == pattern
    assert torch.equal(where[:, :3, :4], where[:, 2:, 2:])
    image = torch.rand(1, 3, 5, 6)
    raw = mosaic(image, pattern)
    for i in range(5):
        for j in range(6):
            assert raw[0, 0, i, j] == image[0, "RGB".index(pattern[2 * (i % 2) + j % 2]), i, j]


@pytest.mark.fault("N07")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bilinear_demosaicing_is_exact_on_planes_and_the_mean_of_neighbours(pattern):
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(8.0), indexing="ij")
    plane = torch.stack([0.1 + 0.02 * rows, 0.5 - 0.03 * columns, 0.2 + 0.01 * rows + 0.04 * columns])[None]
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(bilinear(mosaic(plane, pattern), pattern)[inside], plane[inside])
    image = torch.rand(1, 3, 9, 8, generator=noise(0))
    raw, where = mosaic(image, pattern)[0, 0], sites(pattern, 9, 8)[0]
    found = bilinear(raw[None, None], pattern)[0]
    for c in range(3):
        for i in range(9):
            for j in range(8):
                near = [(i, j)] if where[c, i, j] else []
                for steps in (((-1, 0), (1, 0), (0, -1), (0, 1)), ((-1, -1), (-1, 1), (1, -1), (1, 1))):
                    if not near:
                        places = [(i + a, j + b) for a, b in steps if 0 <= i + a < 9 and 0 <= j + b < 8]
                        near = [place for place in places if where[c][place]]
                mean = torch.stack([raw[place] for place in near]).mean()
                assert found[c, i, j].item() == pytest.approx(mean.item(), abs=1e-6)


def test_demosaicing_takes_the_mosaic_gray_or_in_colour():
    model = build("demosaicing", pattern="GBRG").eval()
    task = model.task("t")
    image = smooth(4, (31, 30))
    raw = mosaic(image, "GBRG")
    coloured = image * sites("GBRG", 31, 30)
    answer = model.predict(raw)["t"]
    assert answer.shape == image.shape
    assert torch.equal(answer, bilinear(raw, "GBRG")), "untrained: the bilinear picture"
    assert torch.equal(answer, model.predict(coloured)["t"])
    x, target = task.prepare(batch(image), rngs(1))
    assert torch.equal(x, answer)
    task.update(task.postprocess(image, x), x, target)
    values = task.metrics.compute()
    rounded = (x.clamp(0, 1) * 255).round() / 255
    error = (rounded - image)[..., 10:-10, 10:-10].square().mean().item()
    assert values["cpsnr_bilinear"].item() == pytest.approx(-10 * math.log10(error), abs=1e-3)
    for size in ((1, 1), (1, 5), (4, 1)):
        assert model.predict(torch.rand(1, *size))["t"].shape == (3, *size)


def test_predict_makes_a_colour_file_of_a_gray_mosaic(tmp_path):
    save_safetensors(build("demosaicing"), tmp_path / "m.safetensors")
    raw = (mosaic(smooth(12, (12, 14)), "RGGB") * 255).round().to(torch.uint8)
    Image.fromarray(raw[0, 0].numpy()).save(tmp_path / "a.png")
    assert main(["predict", *(str(tmp_path / name) for name in ("m.safetensors", "a.png")), "-o", str(tmp_path)]) == 0
    found, gray = read_image(tmp_path / "t" / "a.png")
    assert not gray
    expected = (bilinear(raw / 255, "RGGB")[0] * 255).round() / 255
    torch.testing.assert_close(found, expected, atol=0.51 / 255, rtol=0)


# ---- JPEG


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_compression_is_that_of_a_file(tmp_path, channels, mode):
    image = smooth(5, (37, 50), channels)[0]
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels.squeeze()).save(tmp_path / "a.jpg", quality=20)
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.mode == mode
    expected, gray = read_image(tmp_path / "a.jpg", channels)
    assert gray == (channels == 1)
    assert torch.equal(jpeg(image, 20), expected)


def test_jpeg_deblocking_draws_qualities_and_keeps_gray_gray():
    model = build("jpeg_deblocking", quality=[5, 60])
    task = model.task("t").train()
    image = smooth(6, count=6) + 0.05 * torch.randn(6, 3, 40, 48, generator=noise(1))
    image = (image.clamp(0, 1) * 255).round() / 255
    x, target = task.prepare(batch(image), rngs(6))
    assert torch.equal(target["image"], image)
    qualities = [{q for q in range(1, 101) if torch.equal(jpeg(a, q), b)} for a, b in zip(image, x, strict=True)]
    assert all(any(5 <= q <= 60 for q in found) for found in qualities)
    assert len({min(found) for found in qualities}) > 2
    same = image[:, :1].expand(-1, 3, -1, -1)
    x, target = task.eval().prepare(batch(same, gray=True), rngs(6))
    assert torch.equal(x[:, 0], x[:, 2])
    assert torch.equal(x[0, :1], jpeg(same[0, :1], 32))
    task.update(model({"t": x})["t"].detach(), x, target)
    values = task.metrics.compute()
    errors = (x - same).square().flatten(1).mean(1)
    assert values["psnr_jpeg"].item() == pytest.approx((-10 * errors.log10()).mean().item(), abs=1e-3)
    assert values["psnr"].item() == pytest.approx(values["psnr_jpeg"].item(), abs=1e-3)
    assert task.convention.startswith("quality 32, 8-bit RGB")


# ---- restoration


def test_restoration_takes_pairs_and_passes_the_image_on():
    model = build("restoration", PAIRS)
    task = model.task("t")
    degraded, clean = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 12, 12)
    clean[1] = math.nan
    data = batch(degraded, target=clean)
    x, target = task.prepare(data, rngs(2))
    assert x is data["image"]
    terms = task.loss(model({"t": x})["t"], target)
    assert terms["l1"][1].item() == clean[0].numel()
    task.update(x, x, target)
    assert task.metrics.count.item() == 1
    assert all(p.isfinite().all() for p in task.draw(x[1:], x[1:], {"image": target["image"][1:]}))
    assert torch.equal(model.predict(degraded)["t"], degraded)


# ---- CutBlur and padding


def test_cutblur_pastes_one_box_either_way():
    x, truth = torch.zeros(100, 1, 20, 30), torch.ones(100, 1, 20, 30)
    mixed = cutblur(x, truth, rngs(100), 1.0)
    boxes, reversed_, places = 0, 0, set()
    for image in mixed[:, 0]:
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]].sum()  # a box of 0.7 of the sides covers one corner at most
        box = (image == (corners < 2)).int()
        boxes, reversed_ = boxes + int(corners < 2), reversed_ + int(corners > 2)
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box.bool(), rows[:, None] & columns[None])
        assert abs(int(rows.sum()) - 14) <= 1
        assert abs(int(columns.sum()) - 21) <= 1
        places.add((int(rows.int().argmax()), int(columns.int().argmax())))
    assert boxes + reversed_ == 100
    assert 35 < boxes < 65
    assert {row for row, _ in places} >= set(range(6))
    assert torch.equal(cutblur(x, truth, rngs(100), 1.0), mixed)
    assert 15 < cutblur(x, truth, rngs(100), 0.3).flatten(1).any(1).sum() < 45
    assert cutblur(x, truth, rngs(100), 0.0) is x


def test_boxes_of_cutblur_are_drawn_without_the_device():
    """Reading a number from it would wait for all of its work; here the device is not even there."""
    device = torch.device("cuda")
    away = [SimpleNamespace(device=device, initial_seed=lambda seed=seed: seed) for seed in (1, 1, 2)]
    mixed = cutblur(torch.zeros(3, 1, 20, 30), torch.ones(3, 1, 20, 30), away, 1.0)
    assert torch.equal(mixed[0], mixed[1])
    assert not torch.equal(mixed[0], mixed[2])


@pytest.mark.parametrize(
    ("name", "info", "options"),
    [
        ("denoising", RGB, {"sigma": [0, 50]}),
        ("jpeg_deblocking", RGB, {}),
        ("restoration", PAIRS, {}),
        ("super_resolution", RGB, {"upsampling": "pre"}),
    ],
)
def test_cutblur_in_training_only_and_from_the_generators_alone(name, info, options):
    without, task = (build(name, info, cutblur=p, **options).task("t") for p in (0.0, 1.0))
    image = smooth(7, (24, 24))
    more = {"target": image.flip(-1)} if name == "restoration" else {}
    clean = more.get("target", image)
    plain, (x, target) = (
        without.train().prepare(batch(image, **more), rngs(1))[0],
        task.train().prepare(batch(image, **more), rngs(1)),
    )
    assert torch.equal(task.prepare(batch(image, **more), rngs(1))[0], x)
    picture, base = x[:, :3], plain[:, :3]
    changed = picture != base
    assert 0.2 < changed.float().mean() < 0.8
    assert torch.equal(picture[changed], clean[changed])
    assert torch.equal(x[:, 3:], plain[:, 3:])
    assert torch.equal(target["image"], clean)
    assert torch.equal(
        task.eval().prepare(batch(image, **more), rngs(1))[0], without.eval().prepare(batch(image, **more), rngs(1))[0]
    )


@pytest.mark.parametrize("loss", ["l1", ["l1", {"name": "ssim", "weight": 0.2}]])
@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("denoising", RGB),
        ("demosaicing", RGB),
        ("jpeg_deblocking", RGB),
        ("restoration", PAIRS),
        ("super_resolution", RGB),
    ],
)
def test_padded_pixels_do_not_count(name, info, loss):
    model = build(name, info, loss=loss)
    task = model.task("t").train()
    image = torch.rand(2, 3, 24, 26)
    valid = torch.ones(2, 24, 26, dtype=torch.bool)
    valid[0, :, 18:] = False
    more = {"target": image.clone()} if name == "restoration" else {}
    x, target = task.prepare(batch(image, valid=valid, **more), rngs(2))
    assert torch.equal(target["image"].isnan(), ~valid[:, None].expand(-1, 3, -1, -1))
    output = model({"t": x})["t"]
    output.retain_grad()
    terms = task.loss(output, target)
    assert terms["l1"][1].item() == 3 * valid.sum().item()
    sum(total / weight for total, weight in terms.values()).backward()
    assert output.grad.isfinite().all()
    assert not output.grad[0, :, :, 18:].any()


@pytest.mark.parametrize(
    ("name", "info", "options"),
    [
        ("denoising", GRAY, {"noise": "poisson_gaussian", "gain": [0.0, 0.05], "sigma": 10}),
        ("denoising", RGB, {"sigma": [10, 50], "cutblur": 0.5}),
        ("demosaicing", RGB, {"pattern": "BGGR"}),
        ("jpeg_deblocking", RGB, {"quality": [5, 20]}),
        ("restoration", PAIRS, {"loss": ["charbonnier", "ssim"]}),
        ("super_resolution", DOUBLED, {"degradation": "paired", "upsampling": "pre"}),
    ],
)
def test_a_few_steps_reduce_the_loss(name, info, options):
    model = build(name, info, width=16, **{"loss": "mse", **options}).train()
    task = model.task("t")
    clean = torch.rand(4, info.channels, 8, 8, generator=noise(8)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    data = batch(clean)
    if "target" in info.keys:
        degraded = bicubic(bicubic(clean, down=4), up=4 // info.scale)
        data = batch(degraded, target=clean)
    x, target = task.prepare(data, rngs(4))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        terms = task.loss(model({"t": x})["t"], target)
        loss = sum(total / weight for total, weight in terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["denoising", "super_resolution", "demosaicing", "jpeg_deblocking", "colorization"])
def test_losses_of_classes_are_refused(name):
    config = {"backbone": {"name": "plain", "width": 4}, "tasks": {"t": {"name": name, "source": "s", "loss": "dice"}}}
    with pytest.raises(ConfigError, match=r"loss 'dice' is for .*numbers; take .*l1"):
        DenseModel.from_config(config, {"s": SourceInfo()})
