"""Numbers: gradients of own operations, the same by other ways, weights that go round, learning, one seed twice."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from densectx import TASKS
from densectx.checkpoint import header, init_from, load, save_safetensors, to_safetensors
from densectx.errors import CheckpointError
from densectx.losses.elementwise import L1, MSE
from densectx.model import DenseModel
from densectx.nn.ab_bins import AbBins
from densectx.nn.bayer import bilinear, mosaic
from densectx.nn.colour import lab_to_rgb, luma, rgb_to_lab, rgb_to_ycbcr, ycbcr_to_rgb
from densectx.nn.context import basic, large
from densectx.nn.resize import bicubic, deconvolution, interp_map, log_interp_map, mirror, pad_to_multiple, reflect101
from densectx.nn.resize import upsample as enlarge
from densectx.rng import generator
from densectx.types import SourceInfo

ROOT = Path(__file__).resolve().parents[2]
INFO = SourceInfo(classes=("a", "b", "c"), keys=("image", "mask"))


# -- N06: gradients


def stirred(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


OPERATIONS = {
    "pad_to_multiple": partial(pad_to_multiple, multiple=4),
    "upsample": partial(enlarge, factor=2),
    "bicubic down": partial(bicubic, down=2),
    "bicubic up": partial(bicubic, up=2),
    "mirror": partial(mirror, margin=2),
    "reflect101": partial(reflect101, top=4, bottom=3, left=0, right=7),
    "interp_map": partial(interp_map, factor=2),
    "log_interp_map": partial(log_interp_map, factor=2),
    "deconvolution": partial(deconvolution, factor=2),
    "rgb_to_lab": rgb_to_lab,
    "lab_to_rgb": lambda x: lab_to_rgb(x * 50 + 20),
    "luma": luma,
    "rgb_to_ycbcr": rgb_to_ycbcr,
    "ycbcr_to_rgb": ycbcr_to_rgb,
    "bilinear demosaicing": lambda x: bilinear(mosaic(x, "RGGB"), "RGGB"),
    "context": stirred(basic(3, dilations=(1, 2))),
    "context, once padded, residual": stirred(basic(3, dilations=(1, 2), padding="once", residual=True)),
    "wide context": stirred(large(3)),
    "bins": lambda x: AbBins().double().decode(x.repeat(1, 105, 1, 1)[:, :313], 0.38),
    "L1": lambda x: L1()(x, torch.zeros_like(x))[0],
    "MSE": lambda x: MSE()(x, torch.zeros_like(x))[0],
}


@pytest.mark.fault("N06")
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_operations(name):
    torch.manual_seed(0)
    x = (torch.rand(1, 3, 5, 4, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(OPERATIONS[name], x, fast_mode=True)


@pytest.mark.fault("N06")
@pytest.mark.parametrize("name", ["upsample", "bicubic up", "interp_map", "rgb_to_lab", "MSE"])
def test_second_derivatives(name):
    x = (torch.rand(1, 3, 4, 3, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    assert torch.autograd.gradgradcheck(OPERATIONS[name], x, fast_mode=True)


# -- N08: the same by other ways


def model_of(tasks, seed=0, **config):
    torch.manual_seed(seed)
    small = {
        "backbone": {"name": "plain", "width": 8},
        "projection": None,
        "context": {"name": "basic", "dilations": [1, 2]},
    }
    return DenseModel.from_config({**small, **config, "tasks": tasks}, {"x": INFO}).eval()


DECODER = {"name": "decoder", "width": 8, "depth": 1}
ALL = {
    "segmentation": {"name": "segmentation", "source": "x"},
    "denoising": {"name": "denoising", "source": "x", "sigma": [0, 50], "head": DECODER},
    "super_resolution": {"name": "super_resolution", "source": "x", "scale": 2, "head": DECODER},
    "colorization": {"name": "colorization", "source": "x", "head": DECODER},
}


@pytest.fixture(scope="module")
def four():
    model = model_of(ALL)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def differences(found, expected):
    return {key: ((found[key] - y).abs().max() / y.abs().max()).item() for key, y in expected.items()}


@pytest.mark.fault("N08")
def test_batches_memory_formats_and_precisions_agree(four, record_property):
    images = torch.rand(3, 3, 21, 18)
    options = {"denoising.sigma": 25.0}
    whole = four.predict(images, options=options)
    each = [four.predict(image, options=options) for image in images]
    alone = {key: torch.stack([found[key] for found in each]) for key in whole}
    last = four.predict(images.to(memory_format=torch.channels_last), options=options)
    four.to(memory_format=torch.channels_last)
    both = four.predict(images.to(memory_format=torch.channels_last), options=options)
    four.to(memory_format=torch.contiguous_format)
    with torch.autocast("cpu", torch.bfloat16):
        half = four.predict(images, options=options)
    measured = {"batch": alone, "channels_last input": last, "channels_last": both}
    for name, found in measured.items():
        assert max(differences(found, whole).values()) <= 1e-5, name
    low = max(differences(half, whole).values())
    assert 0 < low <= 2e-2
    record_property("evidence", f"largest relative difference of bf16 {low:.2g}, of the others below 1e-5")


@pytest.mark.slow
@pytest.mark.fault("N08")
def test_compiled_is_eager(four):
    images, options = torch.rand(2, 3, 21, 18), {"denoising.sigma": 25.0}
    eager = four.predict(images, options=options)
    four.compile()
    try:
        assert max(differences(four.predict(images, options=options), eager).values()) <= 1e-5
    finally:
        four._compiled_call_impl = None
        torch.compiler.reset()


# -- N09: a few images are learned, a few images with shuffled truth are not


def blocks(count=4, size=32, seed=0):
    """Pictures of squares whose colour follows from their lightness, (count, 3, size, size)."""
    light = torch.rand(count, 1, size // 4, size // 4, generator=torch.Generator().manual_seed(seed))
    light = light.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return torch.cat([light, 0.15 + 0.7 * light**2, 0.9 * (1 - light) * light + 0.1], 1)


def sample(seed):
    image = blocks(seed=seed)
    batch = {
        "image": image,
        "gray": torch.zeros(4, dtype=torch.bool),
        "key": torch.tensor([[0, number] for number in range(4)]),
        "mask": (image[:, 0] * 2.999).long(),
    }
    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    return batch, {"restoration": image, "regression": image.mean(1, keepdim=True), "blurred": blurred}


MARGINS = {  # what is reached beyond the trivial answer: in the metric's own unit, (share of the error) for rmse
    "segmentation": 50,
    "denoising": 1.5,
    "super_resolution": 1.0,
    "demosaicing": 1.0,
    "jpeg_deblocking": 0.2,
    "restoration": 1.5,
    "colorization": 2.0,
    "regression": 0.5,
}
OPTIONS = {"regression": {"high": 1.0}, "jpeg_deblocking": {"quality": 10}, "denoising": {"sigma": 25}}
STEPS = {"demosaicing": 300}
TARGETS = {"restoration": "image", "regression": "map"}


def learned(name, seed, *, shuffled, steps=None):
    """(metric of the task after so many steps on four images, what it must reach, whether more is better)."""
    target_kind = TARGETS.get(name)
    keys = ("image", "target") if target_kind else ("image", "mask")
    info = SourceInfo(classes=("a", "b", "c"), keys=keys, **({"target": target_kind} if target_kind else {}))
    torch.manual_seed(seed)
    head = "linear" if name == "segmentation" else {"name": "decoder", "width": 16, "depth": 1}
    config = {
        "backbone": {"name": "plain", "width": 16},
        "projection": None,
        "context": {"name": "basic", "dilations": [1, 2]},
        "tasks": {"t": {"name": name, "source": "x", "head": head, **OPTIONS.get(name, {})}},
    }
    model = DenseModel.from_config(config, {"x": info}).train()
    task = model.task("t")
    batch, targets = sample(seed)
    if target_kind:
        batch["target"] = targets[name]
        batch.pop("mask")
    if name == "restoration":
        batch["image"] = targets["blurred"]
    x, target = task.prepare(batch, [generator(seed, number) for number in range(4)])
    task.update(
        task.postprocess(
            model.eval()({"t": x})["t"].detach(),
            x,
        ),
        x,
        target,
    )
    values = task.metrics.compute()
    task.metrics.reset()
    model.train()
    trivial, more = float(values[f"{task.score.metric}_{task.score.baseline}"]), task.score.higher_is_better
    aim = trivial + MARGINS[name] if more else trivial * MARGINS[name]
    if shuffled:
        order = torch.Generator().manual_seed(seed)
        target = {key: _shuffled(value, order) for key, value in target.items()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-3 if name == "demosaicing" else 2e-3)  # its ReLUs die sooner
    for _ in range(steps or STEPS.get(name, 150)):
        terms = task.loss(model({"t": x})["t"], target)
        loss = sum(task.coefficients[key] * total / weight for key, (total, weight) in terms.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        task.update(task.postprocess(model.eval()({"t": x})["t"], x), x, target)
    return float(task.metrics.compute()[task.score.metric]), aim, more


def _shuffled(value, order):
    """The same numbers at other pixels."""
    if value.ndim < 3:
        return value
    places = torch.randperm(value.shape[-2] * value.shape[-1], generator=order)
    return value.flatten(-2)[..., places].reshape(value.shape)


def overfits(name, seed, record_property):
    value, aim, more = learned(name, seed, shuffled=False)
    assert (value >= aim) if more else (value <= aim), f"{name}: {value} of {aim}"
    noise, _, _ = learned(name, seed, shuffled=True)
    assert (noise < aim) if more else (noise > aim), f"{name}, shuffled: {noise} of {aim}"
    record_property("evidence", f"{name}, seed {seed}: {value:.4g}, aim {aim:.4g}, shuffled truth {noise:.4g}")


@pytest.mark.fault("N09")
@pytest.mark.parametrize("name", ["denoising", "regression", "segmentation"])
def test_four_images_are_learned_and_shuffled_truth_is_not(name, record_property):
    overfits(name, 0, record_property)


@pytest.mark.slow
@pytest.mark.fault("N09")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(MARGINS))
def test_they_are_in_every_task_and_with_every_seed(name, seed, record_property):
    overfits(name, seed, record_property)


def test_every_task_has_an_aim():
    assert {name for name in TASKS.names() if TASKS.entry(name).entry_point is None} == set(MARGINS)


# -- N10, N11: weights go round

BACKBONES = {
    "plain": {"name": "plain", "width": 6},
    "frontend_vgg16": {"name": "frontend_vgg16", "width": 2, "fc": 4},
    "resnet": {"name": "timm", "model": "resnet10t"},
    "convnext": {"name": "timm", "model": "convnext_atto"},
    "drn": {"name": "drn", "arch": "d_22"},
}


def checkpoint_of(model, path, change=lambda state: state):
    state = change({f"model.{key}": value for key, value in model.state_dict().items()})
    torch.save({"densectx": header(model, {}), "state_dict": state}, path)
    return path


@pytest.mark.fault("N10")
@pytest.mark.parametrize("name", BACKBONES)
def test_weights_come_back_bit_for_bit(tmp_path, name):
    model = model_of({"segmentation": ALL["segmentation"]}, backbone=BACKBONES[name])
    one = load(checkpoint_of(model, tmp_path / "a.ckpt"))
    to_safetensors(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    two = load(tmp_path / "b.safetensors")
    save_safetensors(two, tmp_path / "c.safetensors")
    three = load(checkpoint_of(load(tmp_path / "c.safetensors"), tmp_path / "d.ckpt"))
    plain = load_file(tmp_path / "c.safetensors")
    for found in (one.state_dict(), two.state_dict(), three.state_dict(), plain):
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


@pytest.mark.fault("N10")
def test_a_backbone_goes_to_timm_and_back(tmp_path):
    model = model_of({"segmentation": ALL["segmentation"]}, backbone=BACKBONES["resnet"])
    own = {k.removeprefix("net."): v for k, v in model.backbone.state_dict().items() if k.startswith("net.")}
    other = timm.create_model("resnet10t")
    missing = other.load_state_dict(own, strict=False)
    assert missing.unexpected_keys == []
    assert {key.split(".")[0] for key in missing.missing_keys} <= {"fc"}
    save_file({key: value.contiguous() for key, value in other.state_dict().items()}, tmp_path / "timm.safetensors")
    again = model_of(
        {"segmentation": ALL["segmentation"]},
        seed=1,
        backbone={**BACKBONES["resnet"], "weights": str(tmp_path / "timm.safetensors")},
    )
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(again.backbone.state_dict()[key], value), key


@pytest.mark.fault("N11")
def test_part_of_the_weights_is_said_and_none_is_refused(tmp_path):
    model = model_of({"segmentation": ALL["segmentation"]})
    count = len(model.state_dict())

    def started(change):
        fresh = model_of({"segmentation": ALL["segmentation"]}, seed=1)
        before = {key: value.clone() for key, value in fresh.state_dict().items()}
        said = init_from(fresh, checkpoint_of(model, tmp_path / "part.ckpt", change))
        taken = [k for k, v in fresh.state_dict().items() if torch.equal(v, model.state_dict()[k])]
        left = [k for k, v in fresh.state_dict().items() if torch.equal(v, before[k])]
        return said, taken, left

    first = next(iter(model.state_dict()))
    said, taken, left = started(lambda s: {k: v for k, v in s.items() if k != f"model.{first}"})
    assert f"{count - 1} of {count}" in said
    assert "backbone" in said
    assert first in left
    assert first not in taken
    said, taken, _ = started(lambda s: {**s, "model.more.weight": torch.zeros(2)})
    assert f"{count} of {count}" in said
    assert "not used: more" in said
    said, _, left = started(lambda s: {("model.old" + k if k == f"model.{first}" else k): v for k, v in s.items()})
    assert f"{count - 1} of {count}" in said
    assert first in left
    said, _, left = started(lambda s: {**s, f"model.{first}": s[f"model.{first}"][:1]})
    assert f"{count - 1} of {count}" in said
    with pytest.raises(CheckpointError, match="none of its"):
        started(lambda s: {f"model.x{k}": v for k, v in s.items()})
    with pytest.raises(CheckpointError, match=r"none of its 0"):
        started(lambda s: {})
    for change in (
        lambda s: {f"model.x{k}": v for k, v in s.items()},
        lambda s: {**s, "model.more": torch.zeros(1)},
        lambda s: {k: v for k, v in s.items() if k != f"model.{first}"},
        lambda s: {**s, f"model.{first}": s[f"model.{first}"][:1]},
    ):
        with pytest.raises(CheckpointError, match=r"missing|unexpected|shape"):
            load(checkpoint_of(model, tmp_path / "strict.ckpt", change))


@pytest.mark.fault("N11")
def test_half_precision_and_shared_tensors(tmp_path):
    model = model_of({"segmentation": ALL["segmentation"]})
    path = checkpoint_of(model, tmp_path / "half.ckpt", lambda s: {k: v.half() for k, v in s.items()})
    for found in (load(path),):
        assert all(value.dtype == torch.float32 for value in found.parameters())
        assert all(torch.equal(v, model.state_dict()[k].half().float()) for k, v in found.state_dict().items())
    to_safetensors(path, tmp_path / "half.safetensors")
    assert all(p.dtype == torch.float32 for p in load(tmp_path / "half.safetensors").parameters())

    def shared(state):
        """As files of models with tied or sliced weights have them: views of one storage."""
        flat = torch.cat([value.flatten() for value in state.values()])
        parts = iter(flat.split([value.numel() for value in state.values()]))
        return {key: next(parts).view_as(value) for key, value in state.items()}

    path = checkpoint_of(model, tmp_path / "shared.ckpt", shared)
    to_safetensors(path, tmp_path / "shared.safetensors")
    for found in (load(path), load(tmp_path / "shared.safetensors")):
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in found.state_dict().items())


# -- N12: one seed, twice

TRAINING = """
import hashlib, sys
import torch
import densectx, pytorch_lightning as pl
torch.set_num_threads(int(sys.argv[1]))
pl.seed_everything(3)
data = densectx.DataModule({"x": {"name": "mosaic", "size": 24, "length": 8, "batch_size": 4, "augment": {"flip": True}}})
config = {"backbone": {"name": "plain", "width": 6}, "projection": None, "context": "context7",
          "tasks": {"denoising": {"name": "denoising", "source": "x", "sigma": [0, 50]},
                    "segmentation": {"name": "segmentation", "source": "x"}}}
model = densectx.DenseModel.from_config(config, data.info())
module = densectx.DenseModule(model, lambda p: torch.optim.AdamW(p, lr=1e-2))
trainer = pl.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False, use_distributed_sampler=False)
trainer.fit(module, datamodule=data)
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.fault("N12")
def test_one_seed_twice_in_other_processes(tmp_path, record_property):
    imports = "import timm, kornia, scipy.ndimage, torchmetrics, PIL.Image\n"
    starts = {"a": ("1", "", "0"), "b": ("1", imports, "77"), "c": ("2", "", "5")}
    running = []
    for name, (threads, before, seed) in starts.items():
        command = [sys.executable, "-W", "ignore", "-c", before + TRAINING, threads, str(tmp_path / name)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        running.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL))
    try:
        assert [process.wait(120) for process in running] == [0, 0, 0]
    finally:
        for process in running:
            process.kill()
            process.wait()
    one, two, threads = (torch.load(tmp_path / name, weights_only=True) for name in starts)
    assert all(torch.equal(one[key], two[key]) for key in one)
    worst = max((one[key] - threads[key]).abs().max().item() for key in one)
    assert worst < 1e-4
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in one.values())).hexdigest()[:12]
    record_property("evidence", f"weights {digest} twice; with 2 threads they differ by up to {worst:.2g}")
