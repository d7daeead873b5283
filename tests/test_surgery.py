"""A context put into a trained network: the same answers to the bit before it is trained."""

import contextlib
import io
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import densectx
from densectx import cli
from densectx.checkpoint import load, save_safetensors
from densectx.errors import ConfigError
from densectx.nn.context import ContextModule, NoContext
from densectx.surgery import insert_context

TASKS = {
    "segmentation": {"name": "segmentation", "source": "m", "head": {"name": "linear", "dropout": 0.1}},
    "denoising": {"name": "denoising", "source": "m", "sigma": [0, 50], "head": "decoder"},
}


def trained(activation="relu", *, steps=3, **model):
    """A network without context after a few steps from random weights."""
    data = densectx.DataModule({"m": {"name": "mosaic", "size": 24, "length": 8, "batch_size": 2}}, num_workers=0)
    config = {
        "backbone": {"name": "frontend_vgg16", "width": 4, "fc": 8, "padding": "each", "norm": "batch"},
        "projection": {"channels": 6, "activation": activation},
        "context": "none",
        "tasks": TASKS,
        **model,
    }
    torch.manual_seed(0)
    built = densectx.DenseModel.from_config(config, data.info())
    module = densectx.DenseModule(built, lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    module.log = lambda *args, **kwargs: None
    optimizer = module.configure_optimizers()
    for _, batch in zip(range(steps), data.train_dataloader(), strict=False):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    return built.eval()


def answers(model, size=(33, 41)):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return model.predict(image, options={"denoising.sigma": 25.0})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("activation", "context"),
    [
        ("relu", "basic"),
        ("relu", "context7"),
        ("relu", {"name": "basic", "padding": "once"}),
        ("relu", {"name": "basic", "residual": True}),
        ("relu", {"name": "basic", "share": False}),
        ("none", {"name": "basic", "residual": True}),
        ("none", {"name": "large", "residual": True}),
    ],
)
def test_answers_are_the_same_to_the_bit(activation, context):
    model = trained(activation)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = answers(model)
    grown = insert_context(model, context)
    assert all(isinstance(part, ContextModule) for part in grown.context.values())
    assert same(answers(grown), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert isinstance(model.context["shared"], NoContext)
    assert not grown.training


def test_wide_contexts_are_the_same_up_to_rounding():
    model = trained()
    for key, answer in answers(insert_context(model, "large")).items():
        torch.testing.assert_close(answer, answers(model)[key], rtol=1e-5, atol=1e-6)


def test_what_was_put_in_is_trained_and_kept_in_files(tmp_path):
    grown = insert_context(trained())
    save_safetensors(grown, tmp_path / "grown.safetensors")
    again = load(tmp_path / "grown.safetensors")
    assert same(answers(again), answers(grown))
    assert again.config["context"] == {"name": "basic", "init_noise": 0.0}
    loss = sum(
        answer.square().sum()
        for answer in grown({key: torch.rand(1, 4 if key == "denoising" else 3, 16, 16) for key in TASKS}).values()
    )
    loss.backward()
    assert all(parameter.grad.any() for parameter in grown.context.parameters() if parameter.ndim > 1)


def test_noise_that_is_asked_for_is_given():
    model = trained()
    assert not same(answers(insert_context(model, {"name": "basic", "init_noise": 0.01})), answers(model))


def test_features_that_may_be_negative_are_not_cut_off_unasked():
    model = trained("none")
    with pytest.raises(ConfigError, match=r"may be negative, and a context starts as max\(x, 0\).*residual: true"):
        insert_context(model)
    grown = insert_context(model, truncate=True)
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        scores = model.trunk(image)[-1]
        assert (scores < 0).any()
        assert torch.equal(grown.context["shared"](grown.trunk(image)[-1]), scores.clamp_min(0))


@pytest.mark.parametrize(("signed", "backbone"), [(False, "plain"), (True, "test-signed")])
def test_without_a_projection_a_picture_shows_it(signed, backbone):
    @densectx.BACKBONES.register("test-signed")
    class Signed(densectx.BACKBONES.get("plain")):
        """Without its last ReLU."""

        def __init__(self, width: int = 8) -> None:
            super().__init__(width=width)
            self.layers = nn.Sequential(*list(self.layers)[:-1])

    try:
        model = trained(projection=None, backbone={"name": backbone, "width": 6})
        if signed:
            with pytest.raises(ConfigError, match="may be negative"):
                insert_context(model)
        else:
            assert same(answers(insert_context(model)), answers(model))
    finally:
        densectx.BACKBONES.unregister("test-signed")


def test_modes_are_left_alone():
    model = trained(projection=None, backbone={"name": "plain", "width": 6})
    model.train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    assert insert_context(model).training
    assert [module.training for module in model.modules()] == modes


def test_what_cannot_be_done():
    model = trained(steps=0)
    with pytest.raises(ConfigError, match="has a context already"):
        insert_context(insert_context(model))
    with pytest.raises(ConfigError, match="did you mean 'basic'"):
        insert_context(model, "basik")
    bare = densectx.DenseModel(model.backbone, model.projection, dict(model.context.items()), dict(model.tasks.items()))
    with pytest.raises(ConfigError, match="has no config"):
        insert_context(bare)


# the same by configs --------------------------------------------------------------------------------------------------

CONFIG = """
model:
  backbone: {name: frontend_vgg16, width: 4, fc: 8, padding: each}
  projection: {channels: 6, activation: relu}
  context: none
  tasks:
    segmentation: {name: segmentation, source: m}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001}}
data:
  sources: {m: {name: mosaic, size: 24, length: 4, val_length: 2}}
  num_workers: 0
trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.mark.parametrize(
    ("activation", "context"),
    [("relu", "{name: basic, init_noise: 0}"), ("none", "{name: basic, init_noise: 0, residual: true}")],
)
def test_in_a_config(tmp_path, monkeypatch, activation, context):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DENSECTX_RUN", "")
    (tmp_path / "a.yaml").write_text(CONFIG)
    more = ["--model.projection.activation", activation]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["fit", "-c", "a.yaml", "--name", "without", *more]) == 0
        more += ["--init_from", "runs/without/0", "--model.context", context, "--model.optimizer.init_args.lr", "0.0"]
        assert cli.main(["fit", "-c", "a.yaml", "--name", "with", *more]) == 0
    without, grown = load("runs/without/0"), load("runs/with/0")
    assert isinstance(grown.context["shared"], ContextModule)
    image = torch.rand(1, 3, 30, 35)
    assert same(grown.predict(image), without.predict(image))


CHAIN = """
model:
  name: dilation8_camvid
  backbone: {width: 2, fc: 8}
  tasks: {segmentation: {source: m, label_stride: 8, classes: 10}}
  projection: {channels: 10, std: 0.3}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001, momentum: 0.9, weight_decay: 5.0e-4}}
  param_groups: [{match: "*.bias", lr: 0.002, weight_decay: 0.0}]
data:
  sources: {m: {name: mosaic, size: 40, length: 4, val_length: 2, batch_size: 2, augment: {flip: true}}}
  num_workers: 0
trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false, enable_model_summary: false}
"""


def started_here(arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(arguments) == 0
    return ""


def started_as_a_process(arguments):
    done = subprocess.run([sys.executable, "-m", "densectx", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("run", [started_here, pytest.param(started_as_a_process, marks=pytest.mark.slow)])
def test_the_three_stages_one_after_the_other(tmp_path, monkeypatch, caplog, run):
    """Front end; context on its kept features; both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(CHAIN)

    def fit(name, *flags):
        monkeypatch.setenv("DENSECTX_RUN", "")
        caplog.clear()
        with caplog.at_level("INFO"):
            said = run(["fit", "-c", "a.yaml", "--name", name, *flags])
        return load(tmp_path / "runs" / name / "0"), said + caplog.text

    crop = "{crop: 24, surround: 186, flip: true}"
    front, _ = fit("front", "--model.context", "none", "--data.sources.m.augment", crop)
    frozen = [
        "--model.freeze",
        "[backbone, projection]",
        "--model.cache_features",
        "kept",
        "--init_from",
        "runs/front/0",
    ]
    context, said = fit("context", *frozen, "--trainer.max_steps", "8")
    assert "init_from runs/front/0: 32 of 48 tensors taken; fresh: context" in said
    read, computed = map(int, re.search(r"kept: (\d+) read, (\d+) computed", said).groups())
    assert 6 < computed <= 10  # 4 images, most of them mirrored too, and 2 for validation
    assert read + computed == 8 * 2 + 4 * 2
    joint, said = fit("joint", "--init_from", "runs/context/0", "--data.sources.m.augment", crop)
    assert "48 of 48 tensors taken" in said
    weights = [model.state_dict() for model in (front, context, joint)]
    for key, value in weights[1].items():
        if key.startswith(("backbone", "projection")):
            assert torch.equal(value, weights[0][key]), key
        moved = not torch.equal(value, weights[2][key])
        assert moved or not value.any(), f"{key} is trained again"
    start = densectx.CONTEXTS.build({"name": "basic", "init_noise": 0}, in_channels=10).state_dict()
    for key, value in start.items():
        assert (weights[1][f"context.shared.{key}"] - value).abs().max() < 0.1, "it began as the identity"
    again, said = fit("again", *frozen, "--trainer.max_steps", "8")
    assert " 0 computed" in said
    assert all(torch.equal(again.state_dict()[key], value) for key, value in weights[1].items())


@pytest.mark.parametrize("context", ["aspp", {"name": "basic", "init": "random"}, {"name": "basic", "norm": "batch"}])
def test_contexts_that_start_as_something_else_are_refused(context):
    with pytest.raises(ConfigError, match="does not start as the identity"):
        insert_context(trained(), context)
