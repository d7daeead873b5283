"""``densectx inspect``: costs, effective fields, the command and its files."""

from __future__ import annotations

import inspect as python_inspect
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from densectx import cli
from densectx.building import build_module
from densectx.checkpoint import save_safetensors
from densectx.inspection.cost import cost, count
from densectx.inspection.effective import effective_field
from densectx.inspection.report import Wishes, inspect
from densectx.inspection.subject import Subject, subject_of
from densectx.inspection.text import text_of
from densectx.known_keys import TRAINING_KEYS
from densectx.model import MODEL_KEYS, DenseModel
from densectx.nn.context import Context, ContextModule
from densectx.registry import CONTEXTS
from densectx.types import SourceInfo

CAMVID = "configs/segmentation_camvid.yaml"
INFO = SourceInfo(classes=("a", "b", "c"), keys=("image", "mask"))


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    monkeypatch.setenv("DENSECTX_DATA", "/nonexistent")


def model_of(backbone="plain", context="context7", channels=4, **tasks):
    tasks = tasks or {"segmentation": {"name": "segmentation", "source": "s"}}
    config = {"backbone": backbone, "projection": {"channels": channels}, "context": context, "tasks": tasks}
    return DenseModel.from_config(config, {"s": INFO})


def inspected(model, **wishes):
    return inspect(Subject("m", "config", model, lambda: model), Wishes(**wishes))


def run(capsys, *arguments):
    status = cli.main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


# ---- cost


def test_parameters_of_the_paper():
    """Basic has 64 C^2 + 8 C; Large, context7 and context10 as counted in the published nets; the front ends."""
    for channels in (11, 19, 21):
        assert count(CONTEXTS.build("basic", "c", in_channels=channels)) == 64 * channels**2 + 8 * channels
    assert count(CONTEXTS.build("large", "c", in_channels=21)) == 6_803_139
    assert count(CONTEXTS.build("context7", "c", in_channels=21)) == 24_402
    assert count(CONTEXTS.build("context10", "c", in_channels=19)) == 29_792
    for name, parameters in (
        ("frontend_vgg16", 134_346_581),
        ("dilation7_kitti", 134_305_611 + 6_732),
        ("dilation10_cityscapes", 134_338_387 + 29_792),
    ):
        assert cost(subject_of(name).shell, (8, 8)).total.parameters == parameters


def test_multiply_adds_of_vgg16():
    """The 13 convolutions at stride 8 on 256x256 take 25.5 G: 9 in out h w each, written out."""
    with torch.device("meta"):
        model = model_of("dilated_vgg16", "none")
    widths = [(64, 64, 1), (128, 128, 2), (256, 256, 256, 4), (512, 512, 512, 8), (512, 512, 512, 8)]
    total, before = 0, 3
    for *stage, stride in widths:
        for width in stage:
            total += 9 * before * width * (256 // stride) ** 2
            before = width
    found = cost(model, (256, 256))
    assert found.parts["backbone"].macs == total
    assert total / 1e9 == pytest.approx(25.5, abs=0.05)
    assert found.parts["projection"].macs == 512 * 4 * 32 * 32
    assert found.macs_per_pixel == found.total.macs / 256**2


def test_multiply_adds_of_a_context_and_heads():
    model = model_of(context="basic", channels=5)
    found = cost(model, (16, 24))
    cells = 16 * 24  # plain has stride 1
    assert found.parts["context"].macs == (7 * 9 + 1) * 25 * cells
    assert found.parts["tasks.segmentation"].macs == 5 * 3 * cells
    assert found.total.parameters == sum(p.numel() for p in model.parameters())
    assert found.total.macs == sum(part.macs for part in found.parts.values())


def test_a_denoiser_that_is_told_the_level_has_a_cost():
    tasks = {"denoising": {"name": "denoising", "source": "s", "sigma": [0, 50], "head": "decoder"}}
    assert cost(model_of(**tasks), (16, 16)).parts["tasks.denoising"].macs > 0


def test_multiply_adds_behind_the_head_are_those_of_its_task():
    """A distribution a cell: 1x1 convolution to 313 logits, and the mean of 313 centres along a and b."""
    tasks = {"t": {"name": "colorization", "source": "s", "target": "bins", "width": 7, "stride": 4}}
    model = model_of(**tasks, s={"name": "segmentation", "source": "s"})
    plain = model_of(t={**tasks["t"], "target": "regression", "width": None, "stride": None})
    found, without = cost(model, (16, 24)), cost(plain, (16, 24))
    exit_conv = 9 * 32 * 16 * 24  # of the decoder, for each channel that it gives
    behind = (7 + 2) * 313 * (16 // 4) * (24 // 4)
    assert found.parts["tasks.t"].macs - without.parts["tasks.t"].macs == behind + (7 - 2) * exit_conv
    assert found.parts["backbone"].macs == cost(model, (16, 24), ["s"]).parts["backbone"].macs * 2
    assert found.total.macs == sum(part.macs for part in found.parts.values())


def test_a_shared_pass_is_counted_once():
    tasks = {key: {"name": "denoising", "source": "s", "head": "linear"} for key in ("a", "b")}
    one, two = cost(model_of(**tasks), (16, 16), ["a"]), cost(model_of(**tasks), (16, 16))
    assert one.parts["backbone"] == two.parts["backbone"]
    assert one.parts["tasks.b"].macs == 0
    assert two.parts["tasks.b"].macs == two.parts["tasks.a"].macs == one.parts["tasks.a"].macs


# ---- effective field


@pytest.mark.parametrize("depth", [8, 16])
def test_effective_field_of_a_linear_stack(depth):
    """Means of 3x3 repeated n times are close to a Gaussian of variance 2 n / 3 (central limit theorem)."""
    layers = [nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1 / 9)
    found = effective_field(nn.Sequential(*layers), (1, 1, 65, 65), samples=2)
    sigma = math.sqrt(2 * depth / 3)
    assert found.sigma == pytest.approx((sigma, sigma), rel=0.03)
    # above 4.55 % of the peak lies a disk of radius sigma * sqrt(-2 ln 0.0455)
    assert found.side == pytest.approx(math.sqrt(math.pi * -2 * math.log(0.0455)) * sigma, rel=0.06)
    assert found.map.max() == 1
    assert np.unravel_index(found.map.argmax(), found.map.shape) == found.position == (32, 32)
    support = np.nonzero(found.map[32])[0]
    assert (support.min(), support.max()) == (32 - depth, 32 + depth)


def test_effective_field_of_an_identity():
    """A context that starts as the identity sees one cell, however wide its field."""
    found = effective_field(ContextModule(3, init_noise=0.0), (2, 3, 70, 70), samples=4)
    assert (found.area, found.side) == (1, 1.0)


def test_effective_field_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Dropout(0.5), nn.BatchNorm2d(1)).train()
    model[2].eval()  # a frozen part
    first, second = (effective_field(model, (1, 1, 9, 9)).map for _ in range(2))
    assert np.array_equal(first, second)
    assert [part.training for part in model.modules()] == [True, True, True, False]
    assert model[0].weight.grad is None


# ---- the command


def test_config_without_its_data(capsys):
    status, out, _ = run(capsys, CAMVID, "--shifts", 0, "--effective", 0, "--field", 130)
    assert status == 0
    assert "a config: fresh random weights" in out
    assert "dilations  1 1 2 4 8 16 1" in out
    assert "67 of 67 taps" in out
    assert "for a field of 130 cells (fields of 3x3 layers are odd: 131): dilations 1 1 2 4 8 16 32 1" in out
    assert "the same, every pixel connected" in out
    assert "context.shared.layers.10" in out


def test_json_of_a_checkpoint(tmp_path, capsys):
    denoise = {"name": "denoising", "source": "s"}
    torch.manual_seed(0)
    model = model_of(segmentation={"name": "segmentation", "source": "s"}, denoise=denoise)
    path = tmp_path / "model.safetensors"
    save_safetensors(model, path)
    status, out, err = run(capsys, path, "--json", "-o", tmp_path / "out", "--shifts", 4, "--size", "32x48")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["format"] == 1
    assert report["kind"] == "weights"
    assert set(report) >= {"name", "stride", "size", "cost", "tasks", "contexts", "references", "suggestion", "skipped"}
    assert report["size"] == [32, 48]
    assert report["cost"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert set(report["tasks"]) == {"segmentation", "denoise"}
    task = report["tasks"]["segmentation"]
    assert task["answer"]["field"] == [37, 37]  # 3 of the backbone + 34 of the context
    assert task["halo"] == {"left": 18, "right": 18, "top": 18, "bottom": 18}
    assert task["measured"]["columns"]["field"] == 37
    assert task["measured"]["columns"]["agrees"] is True
    assert all(error["interior"] < 1e-5 for error in task["shifts"]), "stride 1: equivariant to every shift"
    assert [error["shift"] for error in task["shifts"]] == [1, 2, 3, 4]
    assert min(error["interior"] for error in report["references"]["segnet"]) > 0.1
    context = report["contexts"]["shared"]
    assert (context["dilations"], context["field"], context["connected"]) == ([1, 1, 2, 4, 8, 1], 35, 35)
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == report
    names = ["figure1", "growth", "gallery", "effective_field.segmentation", "effective_field.denoise"]
    for name in names:
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 100


def test_a_run_folder_and_tasks(tmp_path, capsys):
    tasks = {key: {"name": "segmentation", "source": "s"} for key in ("one", "two")}
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    model = model_of(**tasks)
    from densectx.checkpoint import header

    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "densectx": header(model)}, folder / "best.ckpt")
    status, out, _ = run(capsys, tmp_path / "run", "--tasks", "two", "--shifts", 0, "--effective", 16)
    assert status == 0
    assert "trained weights" in out
    assert "an answer of two sees" in out
    assert "an answer of one" not in out


def test_global_layers_are_said(tmp_path, capsys):
    path = tmp_path / "aspp.safetensors"
    save_safetensors(model_of(context="aspp"), path)
    status, out, _ = run(capsys, path, "--shifts", 2, "--effective", 32)
    assert status == 0
    assert "global: context.shared" in out
    assert "context shared (ASPP, 4 channels): global" in out
    report = json.loads(run(capsys, path, "--json", "--shifts", 0)[1])
    assert report["tasks"]["segmentation"]["answer"]["field"] == [None, None]
    assert report["tasks"]["segmentation"]["measured"] is None
    assert report["contexts"]["shared"]["dilations"] is None


class Depthwise(Context):
    """A context whose first weight does not tell its channels."""

    receptive_field = 3

    def __init__(self, in_channels):
        super().__init__()
        self.layers = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("context", ["context7", "none", "depthwise"])
def test_channels_of_a_context_are_those_in_front_of_it(context):
    CONTEXTS.register("depthwise")(Depthwise)
    try:
        report = inspected(model_of(context=context), shifts=2, effective=0)
    finally:
        CONTEXTS.unregister("depthwise")
    assert report.content["contexts"]["shared"]["channels"] == 4


def test_a_zeroed_trunk_is_a_constant_and_no_global_layer():
    both = {"s": {"name": "segmentation", "source": "s"}, "d": {"name": "denoising", "source": "s"}}
    model = model_of(**both)
    model.ablate = "trunk_zero"
    report = inspected(model, shifts=0, effective=0)
    zeroed, decoded = report.content["tasks"].values()
    assert "answer" not in zeroed
    assert "the answer of s does not depend on its input" in text_of(report.content)
    assert not any(layer["global"] for layer in zeroed["layers"])
    assert not any(layer["layer"].startswith("context") for layer in zeroed["layers"])
    assert decoded["answer"]["field"] == [9, 9]  # four 3x3 convolutions of the head on the input
    assert decoded["halo"]["left"] > 18  # but a window has the borders of the zeroed context too


@pytest.mark.parametrize("stride", [3, 4])
def test_the_field_of_colour_bins_is_that_of_the_answer(stride):
    """Behind the head cells are averaged and enlarged: a pixel sees all of two cells along each axis."""
    fields = {}
    for target, more in (("regression", {}), ("bins", {"stride": stride})):
        model = model_of(t={"name": "colorization", "source": "s", "target": target, **more})
        report = inspected(model, shifts=4, effective=32)
        task = report.content["tasks"]["t"]
        assert all(one["agrees"] for one in task["measured"].values())
        fields[target] = task["answer"]["field"][0]
    assert fields["bins"] == fields["regression"] - 1 + 2 * stride


def test_the_field_of_two_classes_is_measured():
    """Probabilities of background and foreground sum to one: the gradient of their plain sum is zero."""
    info = SourceInfo(classes=("a", "b"), keys=("image", "mask"))
    config = {"backbone": "plain", "projection": {"channels": 4}, "context": "context7"}
    config["tasks"] = {"t": {"name": "segmentation", "source": "s", "mode": "binary"}}
    found = inspected(DenseModel.from_config(config, {"s": info}), shifts=0, effective=0).content["tasks"]["t"]
    assert [(one["field"], one["agrees"]) for one in found["measured"].values()] == [(37, True)] * 2


def test_a_named_model_says_what_would_take_long(capsys):
    status, out, _ = run(capsys, "frontend_vgg16", "--shifts", 1)
    assert status == 0
    assert "134 346 581" in out
    assert "186 pixels of surroundings" in out
    assert "left out: effective field of segmentation" in out
    assert "left out: shifts of segmentation" in out
    assert [line.split()[0] for line in out.splitlines() if "conv 7x7" in line] == ["backbone.layers.fc6"]


def test_weights_of_a_config_are_not_read(tmp_path, capsys):
    overlay = tmp_path / "weights.yaml"
    overlay.write_text("model: {backbone: {weights: /nonexistent.safetensors}}")
    assert run(capsys, CAMVID, "-c", overlay, "--shifts", 0, "--effective", 0)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["frontend_vgg61"], 4, "frontend_vgg16"),
        (["missing.ckpt"], 4, "no such file"),
        (["missing.yaml"], 2, "missing.yaml"),
        ([CAMVID, "--tasks", "segmentatoin"], 2, "did you mean 'segmentation'"),
        ([CAMVID, "--size", "512"], 2, "no size such as 480x640"),
        ([CAMVID, "--shifts", "-1"], 2, "whole number"),
        ([CAMVID, "--filed", "9"], 2, "did you mean '--field'"),
        ([CAMVID, "--field", "2"], 2, "smallest is 3"),
        (["frontend_vgg16", "-c", CAMVID], 2, "merged after a config"),
        ([], 2, "MODEL"),
    ],
)
def test_errors(capsys, arguments, status, message):
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (status, "")
    assert message in err
    assert err.count("\n") == 1


SMALL = """
model: {backbone: plain, context: none, tasks: {t: {name: segmentation, source: s, %s}}}
data: {sources: {s: {name: mosaic}}}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "bad.yaml"),
        ("data: {}", "no model to inspect"),
        ("model: {backbone: plain, contxt: none, tasks: {}}", "did you mean 'context'"),
        ("model: {backbone: plian, tasks: {t: {name: segmentation, source: s}}}", "did you mean 'plain'"),
        ("modle: {}", "did you mean 'model'"),
        ("model: {backbone: plain, tasks: [segmentation]}", "model.tasks: expected tasks by their keys"),
        (SMALL % "head: {name: linear, dropout: 20}", "dropout 20 is not in [0, 1)"),
        (SMALL.replace("none", "{name: basic, init_noise: .inf}") % "", "init_noise inf is negative or no finite"),
    ],
)
def test_bad_configs(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    found, _, err = run(capsys, path)
    assert found == 2
    assert message in err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    path, blocked = tmp_path / "m.safetensors", tmp_path / "file"
    save_safetensors(model_of(), path)
    blocked.write_text("")
    assert run(capsys, path, "-o", blocked, "--shifts", 0, "--effective", 0)[0] == 8


def test_help_imports_no_torch(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", "--help"])
    assert ended.value.code == 0
    assert "MODEL|CONFIG" in capsys.readouterr().out


def test_model_keys_are_those_of_fit():
    """A config that ``fit`` takes is one that ``inspect`` takes."""
    known = set(python_inspect.signature(build_module).parameters) - {"sources", "seed"}
    assert set(MODEL_KEYS) | set(TRAINING_KEYS) == known


def test_text_of_what_was_not_computed(tmp_path):
    path = tmp_path / "m.safetensors"
    save_safetensors(model_of(), path)
    report = inspect(subject_of(str(path)), Wishes(shifts=0, effective=0))
    assert "relative error" not in text_of(report.content)
    assert report.maps == {}
