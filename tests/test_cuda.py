"""On a GPU: the answers of the CPU, every precision and balancing, going on with a run, windows. Skipped without one."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import densectx
from densectx.cli import main
from densectx.metrics.ssim import ssim
from densectx.registry import BALANCING, CONTEXTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = """
model:
  backbone: {name: dilated_resnet18, levels: 3}
  norm: group
  projection: {channels: 16, activation: relu}
  context: basic
  tasks:
    segmentation: {name: segmentation, source: mosaic, weight: 0.1}
    denoising: {name: denoising, source: mosaic, sigma: [0, 50], weight: 10}
    super_resolution: {name: super_resolution, source: mosaic, scale: 2, weight: 20}
    colorization: {name: colorization, source: mosaic, weight: 5, target: bins}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001}}
  lr_scheduler: {class_path: densectx.schedules.WarmupCosine, init_args: {total_steps: 50, warmup_steps: 2}}
  channels_last: true
data:
  sources:
    mosaic: {name: mosaic, size: 96, length: 64, val_length: 3, batch_size: 4, augment: {flip: true, crop: 64}}
  num_workers: 0
trainer:
  accelerator: gpu
  devices: 1
  max_steps: 8
  val_check_interval: 4
  check_val_every_n_epoch: null
  gradient_clip_val: 1.0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks: [{class_path: pytorch_lightning.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}]
"""


@pytest.fixture(autouse=True)
def exact():
    """Convolutions in float32 as such, which a GPU otherwise does with mantissas of ten bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the default of enabled is False
        assert torch.backends.cudnn.enabled
        yield


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Run ``densectx fit`` with the config above; returns the run folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "small.yaml").write_text(CONFIG)

    def fit(name, *arguments, status=0):
        assert main(["fit", "-c", "small.yaml", "--name", name, "--no-report", *arguments]) == status
        return tmp_path / "runs" / name / "0"

    return fit


def weights(run):
    state = torch.load(run / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if key.startswith("model.")}


def finite(state):
    return all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("preset", ["basic", "large"])
def test_the_context_answers_as_on_the_cpu(preset):
    torch.manual_seed(0)
    module = CONTEXTS.build({"name": preset, "init": "random"}, "model.context", in_channels=4).double()
    x = torch.randn(2, 4, 80, 90, dtype=torch.float64)
    there = copy.deepcopy(module).cuda()
    given = [x.clone().requires_grad_(), x.cuda().requires_grad_()]
    answers = [module(given[0]), there(given[1])]
    for answer in answers:
        answer.square().mean().backward()
    torch.testing.assert_close(answers[1].cpu(), answers[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(given[1].grad.cpu(), given[0].grad, rtol=1e-9, atol=1e-14)


def test_ssim_is_that_of_the_cpu_with_tf32_allowed():
    x = torch.rand(2, 3, 40, 48)
    y = (x + 0.01 * torch.randn(x.shape)).clamp(0, 1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        torch.testing.assert_close(ssim(x.cuda(), y.cuda()).cpu(), ssim(x, y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_it_trains_in_every_precision(fit, precision):
    run = fit("run", "--trainer.precision", precision)
    assert finite(weights(run))
    answer = densectx.load(run / "checkpoints/last.ckpt").predict(torch.rand(3, 40, 48))
    assert {task: tuple(value.shape[-2:]) for task, value in answer.items()} == {
        "segmentation": (40, 48),
        "denoising": (40, 48),
        "super_resolution": (80, 96),
        "colorization": (40, 48),
    }


@pytest.mark.parametrize("method", sorted(BALANCING.names()))
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_every_balancing_trains_in_half_precision(fit, method, precision):
    """Losses are scaled under 16-mixed; a method that reads gradients must not see the scale."""
    run = fit("run", "--trainer.precision", precision, "--model.balancing", method)
    assert finite(weights(run))


def test_a_run_goes_on(fit):
    whole = fit("whole")
    part = fit("part", "--trainer.max_steps", "5")
    assert fit("part", "--resume", str(part), "--allow-changed", "trainer.max_steps") == part
    a, b = weights(whole), weights(part)
    for key, value in a.items():  # a GPU adds up in any order
        assert (b[key] - value).abs().max() < 2e-3, key


def test_windows_give_the_answer_of_the_whole_picture(fit, tmp_path):
    run = fit("run", "--model.norm", "none")  # the statistics of a group are those of the whole picture
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 810, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    for name, more in {"whole": [], "tiles": ["--tile", "exact:256"], "cpu": ["--device", "cpu"]}.items():
        command = ["predict", str(run), str(tmp_path / "a.png"), "-o", str(tmp_path / name), "--raw"]
        assert main([*command, "--tasks", "denoising", "--set", "denoising.sigma=25", *more]) == 0
    whole, tiles, cpu = (np.load(tmp_path / name / "denoising/a.npy") for name in ("whole", "tiles", "cpu"))
    assert np.abs(tiles - whole).max() < 1e-5
    assert np.abs(cpu - whole).max() < 1e-4
