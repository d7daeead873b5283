"""``densectx export``: files that answer as the model does, at sizes that the exporter never saw."""

import io
import json
import pickle
import re
import resource
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import final

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import uses_external_data
from PIL import Image
from torchmetrics import MeanSquaredError

import densectx
from densectx import cli
from densectx.checkpoint import save_safetensors
from densectx.errors import ConfigError, NumericError
from densectx.export import onnx_file, parity, run, torch_files
from densectx.export.graph import TRACED, Graph, describe
from densectx.export.package import Package
from densectx.inference.tiler import Setting
from densectx.inference.tiling import Tiling
from densectx.inspection.cost import cost
from densectx.losses import Criterion
from densectx.model import DenseModel
from densectx.nn.resize import bicubic, pad_to_multiple, upsample
from densectx.registry import HEADS, TASKS
from densectx.tasks.base import Task
from densectx.types import Score, SourceInfo

EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_without_densectx.py"
SIZES = ((1, 33, 47), (3, 65, 23), (2, 40, 64), (1, 21, 22), (1, 7, 97), (1, 1, 1), (2, 3, 2))

PALETTE = ((10, 20, 30), (200, 0, 0), (0, 200, 0))
MASKS = SourceInfo(classes=("sky", "road", "tree"), palette=PALETTE, keys=("image", "mask"))
TWO = SourceInfo(classes=("no", "yes"), keys=("image", "mask"))
LABELS = SourceInfo(classes=("a", "b", "c"), keys=("image", "target"), target="labels")
MAP = SourceInfo(keys=("image", "target"), target="map")
PAIRS = SourceInfo(keys=("image", "target"), target="image")
GRAY = SourceInfo(channels=1)

HEAD = {"name": "decoder", "width": 4, "depth": 1}
SEGMENTATION = {"segmentation": {"name": "segmentation"}}
COLORIZATION = {"colorization": {"name": "colorization", "head": HEAD}}


def denoising(**options):
    return {"denoising": {"name": "denoising", "head": HEAD, **options}}


def sr(**options):
    return {"sr": {"name": "super_resolution", "head": HEAD, **options}}


FOUR = {**SEGMENTATION, **denoising(sigma=[0, 50]), **sr(scale=2), **COLORIZATION}
BOTH = {**SEGMENTATION, **denoising()}
FRONTEND = {"name": "frontend_vgg16", "width": 4, "fc": 8}
UPSAMPLE = {"segmentation": {"name": "segmentation", "head": "upsample"}}


def upsampling(method):
    return {"segmentation": {"name": "segmentation", "head": {"name": "upsample", "method": method}}}


MODELS = {
    "segmentation": (SEGMENTATION,),
    "binary": ({"segmentation": {"name": "segmentation", "mode": "binary"}}, TWO),
    "multilabel": ({"segmentation": {"name": "segmentation", "mode": "multilabel"}}, LABELS),
    "denoising": (denoising(),),
    "denoising, blind": (denoising(sigma=[0, 50], blind=True),),
    "denoising, told": (denoising(sigma=[0, 50]),),
    "denoising, trunk told": (denoising(sigma=[0, 50]), MASKS, {"name": "plain", "width": 4, "in_channels": 4}),
    "denoising, unshuffled": (
        {"denoising": {"name": "denoising", "sigma": [0, 50], "head": "sub_pixel"}},
        MASKS,
        {"name": "plain", "width": 4, "in_channels": 4, "unshuffle": 2},
    ),
    "denoising, poisson": (denoising(sigma=[0, 50], noise="poisson_gaussian", gain=[0, 0.05]),),
    "denoising, gray": (denoising(sigma=[0, 50]), GRAY),
    "sr, x2 post": (sr(scale=2),),
    "sr, x3 post": (sr(scale=3),),
    "sr, x4 post": (sr(scale=4),),
    "sr, x2 pre": (sr(scale=2, upsampling="pre"),),
    "sr, x3 pre": (sr(scale=3, upsampling="pre"),),
    "sr, x3 gray": (sr(scale=3), GRAY),
    "sr, x3 linear": ({"sr": {"name": "super_resolution", "scale": 3, "head": "linear"}},),
    "demosaicing": ({"demosaicing": {"name": "demosaicing", "pattern": "GRBG", "head": HEAD}},),
    "jpeg_deblocking": ({"jpeg_deblocking": {"name": "jpeg_deblocking", "head": HEAD}},),
    "restoration": ({"restoration": {"name": "restoration", "head": HEAD}}, PAIRS),
    "colorization": (COLORIZATION,),
    "colorization, bins": ({"colorization": {**COLORIZATION["colorization"], "target": "bins", "width": 8}},),
    "regression": (
        {"depth": {"name": "regression", "low": 1, "high": 80, "transform": "log", "head": HEAD}},
        MAP,
    ),
    "resnet": (BOTH, MASKS, "dilated_resnet18", {"context": "basic"}),
    "resnet, group": (BOTH, MASKS, "dilated_resnet18", {"norm": "group"}),
    "resnet, per_input": (BOTH, MASKS, "dilated_resnet18", {"norm": "per_input"}),
    "resnet, frozen": (BOTH, MASKS, "dilated_resnet18", {"norm": "frozen"}),
    "resnet, own contexts": (BOTH, MASKS, "dilated_resnet18", {"context": {"name": "basic", "share": False}}),
    "resnet, zeroed": (BOTH, MASKS, "dilated_resnet18", {"ablate": "trunk_zero"}),
    "vgg": (BOTH, MASKS, "dilated_vgg16"),
    "vgg, pools": (BOTH, MASKS, {"name": "dilated_vgg16", "pools": "dilated"}),
    "drn": (SEGMENTATION, MASKS, "drn_d_22"),
    "frontend": (SEGMENTATION, MASKS, FRONTEND),
    "frontend, interp_map": (upsampling("interp_map"), MASKS, FRONTEND, {"projection": {"channels": 3}}),
    "frontend, deconvolution": (upsampling("deconvolution"), MASKS, FRONTEND, {"projection": {"channels": 3}}),
    "aspp": (SEGMENTATION, MASKS, "plain", {"context": "aspp"}),
    "four tasks": (FOUR,),
    "four tasks, resnet": (FOUR, MASKS, "dilated_resnet18"),
}

QUICK = ("denoising, gray", "sr, x3 pre")
QUICK_PT2 = ("four tasks", "frontend, interp_map")


def model_of(tasks, info=MASKS, backbone="plain", more=None, seed=0):
    if backbone == "plain":
        backbone = {"name": "plain", "width": 4, "in_channels": info.channels}
    torch.manual_seed(seed)
    tasks = {key: {"source": "s", **spec} for key, spec in tasks.items()}
    config = {"backbone": backbone, "projection": {"channels": 4}, "context": "context7", "tasks": tasks}
    model = DenseModel.from_config({**config, **(more or {})}, {"s": info})
    for name, parameter in model.named_parameters():  # residual heads start at zero: their answer would be the input
        if name.startswith(("tasks", "context")):
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def chosen(quick):
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in MODELS]


def largest_difference(graph, answer):
    """At SIZES: with options estimated, and given."""
    worst, generator = 0.0, torch.Generator().manual_seed(1)
    assert not set(SIZES) & {TRACED, *parity.SIZES}
    for batch, height, width in SIZES:
        image = torch.rand(batch, graph.channels, height, width, generator=generator)
        for options in {(-1.0,) * len(graph.options), (12.5, 0.02)[: len(graph.options)]}:
            given = dict(zip(graph.options, options, strict=True))
            expected = graph.model.predict(image, graph.tasks, {k: v if v >= 0 else None for k, v in given.items()})
            found = answer([image, *map(torch.tensor, options)])
            assert list(found) == list(expected)
            for key, truth in expected.items():
                assert found[key].shape == truth.shape
                assert found[key].dtype == torch.float32
                scale = truth.abs().max().clamp_min(1)
                worst = max(worst, ((found[key] - truth).abs().max() / scale).item())
    return worst


@pytest.fixture
def written(tmp_path, record_property):
    """Writes a model of MODELS and measures how far the file's answers are from the model's."""

    def written(name, write, suffix):
        model = model_of(*MODELS[name])
        graph = Graph(model, list(model.tasks))
        difference = largest_difference(graph, write(graph, tmp_path / f"model{suffix}", describe(graph)))
        record_property("evidence", f"{name}: {difference:.2g}")
        return difference

    return written


@pytest.mark.fault("N08")
@pytest.mark.parametrize("name", chosen(QUICK))
def test_onnx_answers_as_the_model(name, written):
    assert written(name, onnx_file.write, ".onnx") <= 1e-4


@pytest.mark.fault("N08")
@pytest.mark.parametrize("name", chosen(QUICK_PT2))
def test_pt2_answers_as_the_model(name, written):
    assert written(name, torch_files.write_pt2, ".pt2") <= 1e-4


@pytest.mark.slow
@pytest.mark.fault("N08")
@pytest.mark.parametrize("name", MODELS)
def test_native_code_answers_as_the_model(name, written):
    assert written(name, torch_files.write_aoti, ".pt2") <= 1e-4


@pytest.mark.fault("N08")
def test_safetensors_is_the_model(written):
    assert written("four tasks", torch_files.write_safetensors, ".safetensors") == 0


@pytest.mark.parametrize("name", [name for name, parts in MODELS.items() if len(parts) < 3])
def test_a_pickled_model_answers_as_before(name):
    model, image = model_of(*MODELS[name]), torch.rand(1, 25, 30)
    found = pickle.loads(pickle.dumps(model)).predict(image)
    for key, value in model.predict(image).items():
        assert torch.equal(found[key], value)


@pytest.mark.slow
def test_native_code_is_looked_after(tmp_path):
    model = model_of(denoising(sigma=[0, 50]))
    graph = Graph(model, list(model.tasks))
    torch_files.write_aoti(graph, tmp_path / "m.pt2", describe(graph))
    package, image = Package(tmp_path / "m.pt2"), torch.rand(2, 3, 30, 31)
    assert package.about == describe(graph)
    for given in (None, {"denoising.sigma": 12.0}):
        expected = model.predict(image, options=given)["denoising"]
        for form in (image, image.to(memory_format=torch.channels_last), image.transpose(2, 3).clone().transpose(2, 3)):
            assert (package(form, given)["denoising"] - expected).abs().max() <= 1e-4
    for wrong in (image[:, :1], image[0], image[:, :, :0], image.double()):
        with pytest.raises(ConfigError, match="expected"):
            package(wrong)
    with pytest.raises(ConfigError, match=r"did you mean 'denoising\.sigma'"):
        package(image, {"denoising.sigm": 1.0})


# ---- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_safetensors(model_of({**SEGMENTATION, **denoising(sigma=[0, 50])}), path)
    return path


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """The ONNX file of a model, and what the command printed."""
    out = tmp_path_factory.mktemp("out") / "model.onnx"
    with redirect_stdout(io.StringIO()) as printed:
        assert export(model, "-f", "onnx", "-o", out, "--json") == 0
    return out, printed.getvalue()


def export(*arguments):
    return cli.main(["export", *map(str, arguments)])


def test_what_the_command_says(exported, model):
    out, printed = exported
    found = json.loads(printed)
    assert (found["format"], found["kind"], found["file"], found["opset"]) == (1, "onnx", str(out), 18)
    assert found["bytes"] == out.stat().st_size
    assert found["tasks"] == ["segmentation", "denoising"]
    assert found["options"] == ["denoising.sigma"]
    assert len(found["sizes"]) == 3
    assert list(TRACED) not in found["sizes"]
    assert 0 < found["difference"] <= found["tolerance"] == 1e-4
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"Umask:\s*(\d+)", status).group(1), 8)


def test_names_and_sizes_of_the_onnx_file(exported):
    session = onnxruntime.InferenceSession(exported[0])
    inputs = [(value.name, value.shape, value.type) for value in session.get_inputs()]
    assert inputs == [
        ("image", ["batch", 3, "height", "width"], "tensor(float)"),
        ("denoising.sigma", [], "tensor(float)"),
    ]
    outputs = [(value.name, value.shape) for value in session.get_outputs()]
    assert outputs == [
        ("segmentation", ["batch", 3, "height", "width"]),
        ("denoising", ["batch", 3, "height", "width"]),
    ]


def test_metadata_draws_the_answer(exported, tmp_path):
    about = json.loads(onnxruntime.InferenceSession(exported[0]).get_modelmeta().custom_metadata_map["densectx"])
    assert about["densectx"] == densectx.__version__
    assert about["tasks"]["segmentation"]["classes"] == ["sky", "road", "tree"]
    assert about["tasks"]["segmentation"]["palette"] == [list(colour) for colour in PALETTE]
    assert about["options"] == {"denoising.sigma": {"default": None, "estimated": True}}
    graph = Graph(model_of(SEGMENTATION), ["segmentation"])
    torch_files.write_pt2(graph, tmp_path / "m.pt2", describe(graph))
    extra = {"densectx.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert json.loads(extra["densectx.json"]) == describe(graph)


@pytest.mark.fault("A13")
def test_an_onnx_file_is_all_there_and_names_no_place(exported, tmp_path):
    proto = onnx.load(exported[0], load_external_data=False)
    assert not any(uses_external_data(tensor) for tensor in proto.graph.initializer)
    alone = tmp_path / "alone.onnx"
    shutil.copy(exported[0], alone)
    onnxruntime.InferenceSession(alone)
    content = exported[0].read_bytes()
    for place in (str(Path(densectx.__file__).parent), sys.prefix, str(Path.home())):
        assert place.encode() not in content
    graph = Graph(model_of(SEGMENTATION), ["segmentation"])
    torch_files.write_pt2(graph, tmp_path / "m.pt2", describe(graph))
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        for name in archive.namelist():
            assert str(Path(densectx.__file__).parent).encode() not in archive.read(name)


@pytest.mark.fault("A13")
@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "weights.bin"])
def test_links_out_of_an_onnx_file_are_not_followed(tmp_path, location, capsys):
    values = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    values.data_location = onnx.TensorProto.EXTERNAL
    values.external_data.add(key="location", value=location)
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    path = tmp_path / "linked.onnx"
    path.write_bytes(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [output], [values])).SerializeToString()
    )
    assert export(path, "-f", "safetensors", "-o", tmp_path / "out.safetensors") == 4
    assert cli.main(["predict", str(path), str(path), "-o", str(tmp_path / "answers")]) == 4
    assert "cannot be read as a checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["linked.onnx"]


def test_tasks_are_chosen(model, tmp_path, capsys):
    out = tmp_path / "s.pt2"
    assert export(model, "-f", "pt2", "-o", out, "--tasks", "segmentation") == 0
    assert "pt2" in capsys.readouterr().out
    program = torch.export.load(out).module()
    assert list(program(torch.rand(1, 3, 5, 9))) == ["segmentation"]
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.rand(1, 4, 5, 9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-f", "pt2", "-o", "{out}", "--tasks", "sgmentation"], "did you mean 'segmentation'"),
        (["-f", "pt", "-o", "{out}"], "invalid choice: 'pt'"),
        (["-o", "{out}"], "-f/--format"),
        (["-f", "pt2", "-o", "{out}", "--overwrit"], "did you mean '--overwrite'"),
        (["-f", "pt2", "-o", "{model}"], "is the model itself"),
        (["-f", "pt2", "-o", "{model}", "--overwrite"], "is the model itself"),
        (["-f", "pt2", "-o", "{link}", "--overwrite"], "is the model itself"),
        (["-f", "pt2", "-o", "{here}"], "exists already; --overwrite"),
        (["-f", "pt2", "-o", "{folder}", "--overwrite"], "is a folder"),
        (["-f", "pt2", "-o", "{folder}/no/m.pt2"], "there is no folder"),
        (["-f", "aoti", "-o", "{out}"], "name it out.bin.pt2"),
        (["-f", "safetensors", "-o", "{out}"], "name it out.bin.safetensors"),
        (["-f", "safetensors", "-o", "{out}", "--tasks", "denoising"], "leave --tasks away"),
    ],
)
def test_refusals(model, tmp_path, capsys, arguments, message):
    own, here, link = tmp_path / "m.safetensors", tmp_path / "here.pt2", tmp_path / "link.pt2"
    shutil.copy(model, own)
    here.write_bytes(b"mine")
    link.symlink_to(own)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    names = {"out": tmp_path / "out.bin", "model": own, "here": here, "link": link, "folder": tmp_path}
    assert export(own, *(text.format(**names) for text in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_answers_otherwise_is_not_kept(model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "m.onnx"
    out.write_bytes(b"before")
    monkeypatch.setattr(onnx_file, "record", lambda graph, record=onnx_file.record: record(_other(graph)))
    assert export(model, "-f", "onnx", "-o", out, "--overwrite", "--tasks", "segmentation") == 6
    error = capsys.readouterr().err
    assert re.search(r"task 'segmentation': the file and the model differ by 0\.\d+ at an image of 1 x 3 x", error)
    assert "above 0.0001" in error
    assert out.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def _other(graph):
    return Graph(model_of({**SEGMENTATION, **denoising(sigma=[0, 50])}, seed=7), graph.tasks)


@pytest.mark.parametrize("wrong", [torch.nan, 3e-4])
def test_what_is_no_number_or_too_far_is_told(wrong):
    graph = Graph(model_of(SEGMENTATION), ["segmentation"])
    assert parity.check(graph, lambda arguments: graph(*arguments)) == (0.0, 3)
    with pytest.raises(NumericError, match="differ by"):
        parity.check(graph, lambda arguments: {"segmentation": graph(*arguments)["segmentation"] + wrong})
    with pytest.raises(NumericError, match=r"the file answers \(1, 3, 61, 82\)"):
        parity.check(graph, lambda arguments: {"segmentation": graph(*arguments)["segmentation"][..., 1:]})


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(model, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(run, "find_spec", lambda wanted: None if wanted == name else object())
    assert export(model, "-f", "onnx", "-o", tmp_path / "m.onnx") == 2
    assert f"needs {name}: pip install '.[export]' in a checkout of densectx" in capsys.readouterr().err


def test_more_weights_than_one_onnx_file_holds_are_refused(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_file, "LIMIT", 1000)
    assert export(model, "-f", "onnx", "-o", tmp_path / "m.onnx") == 2
    assert "one ONNX file holds 2; take -f pt2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["safetensors", "pt2"])
def test_a_disk_that_refuses(model, tmp_path, capsys, kind):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # bytes of a file
    try:
        assert export(model, "-f", kind, "-o", tmp_path / f"m.{kind}") == 8
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"error: {tmp_path / f'm.{kind}'}: cannot be written: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- without densectx


def test_the_example_needs_neither_densectx_nor_torch(exported, model, tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 30
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    picture = tmp_path / "picture.png"
    Image.fromarray(pixels).save(picture)
    forbid = "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'densectx')))\n"
    program = f"{forbid}sys.argv = ['x', *{[str(exported[0]), str(picture), str(tmp_path)]!r}]\n"
    program += f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\nassert not sys.modules['torch']"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    answers = densectx.load(model).predict(torch.from_numpy(pixels).permute(2, 0, 1))
    classes = Image.open(tmp_path / "segmentation.png")
    assert np.array_equal(np.asarray(classes), answers["segmentation"].argmax(0).numpy())
    assert np.array_equal(
        np.asarray(classes.convert("RGB"))[0, 0], PALETTE[int(answers["segmentation"][:, 0, 0].argmax())]
    )
    clean = (answers["denoising"].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(tmp_path / "denoising.png")) - clean).max() <= 0.51


class Session:
    """In the place of onnxruntime's: three tasks on colours, one of which answers with the picture."""

    def __init__(self, path):
        outputs = {"same": "restored", "depth": "values", "tags": "labels"}
        tasks = {key: {"output": output, "palette": []} for key, output in outputs.items()}
        self.about = {"image": {"channels": 3}, "options": {}, "tasks": tasks}

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map={"densectx": json.dumps(self.about)})

    def run(self, names, feed):
        return [feed["image"], feed["image"][:, :1] * 80, feed["image"].repeat(2, 1)][: len(names)]


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_example_takes_sides_of_one_pixel(tmp_path, monkeypatch, shape, channels):
    session = Session("m.onnx")
    session.about["image"]["channels"] = channels
    session.about["tasks"] = {"same": session.about["tasks"]["same"]}
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=lambda path: session))
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)[: 2 + (channels > 1)], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["x", "m.onnx", str(tmp_path / "a.png"), str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "same.png")), pixels)


def test_the_example_keeps_numbers_and_refuses_what_it_would_cut_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # upright after a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    monkeypatch.setattr(sys, "argv", ["x", "m.onnx", str(tmp_path / "a.png"), str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    upright = np.rot90(pixels, -1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "same.png")), upright)
    depth, tags = (np.load(tmp_path / f"{key}.npy") for key in ("depth", "tags"))
    assert np.allclose(depth, upright[None, ..., 0] / 255 * 80, atol=1e-4)
    assert tags.shape == (6, 6, 4)
    for name, wrong in (("b.png", np.zeros((4, 6), np.uint16)), ("c.png", np.zeros((4, 6, 4), np.uint8))):
        Image.fromarray(wrong).save(tmp_path / name)
        monkeypatch.setattr(sys, "argv", ["x", "m.onnx", str(tmp_path / name), str(tmp_path)])
        with pytest.raises(SystemExit, match=f"{name}: is of mode "):
            runpy.run_path(str(EXAMPLE), run_name="__main__")


# ---- run-time options of plug-ins


@final
class Stops(Task):
    """Brightens an image by 2 to 4 stops: a plug-in's option with a default and a range, and nothing to estimate it."""

    score = Score("mse", "mse")
    options: Mapping[str, float | None] = {"stops": 3.0}

    def __init__(self, features, in_channels, info, source):
        super().__init__(source, 1.0, channels=3, in_channels=in_channels)
        self.head = HEADS.build("linear", features=features, out_channels=3, scale=1)
        self.metrics, self.criterion = MeanSquaredError(), Criterion("l1")

    def prepare(self, batch, rngs):
        return batch["image"], {}

    def inputs(self, image, options):
        stops = torch.as_tensor(options["stops"], device=image.device)
        if not (stops.is_meta or torch.compiler.is_compiling()) and not ((stops >= 2) & (stops <= 4)).all():
            raise ConfigError(f"stops {stops} is not in 2..4")
        return image * 2 ** stops.view(-1, 1, 1, 1)

    def loss(self, output, target):
        return {}

    def postprocess(self, output, x):
        return output

    def update(self, prediction, x, target):
        pass

    def draw(self, prediction, x, target):
        return []


@pytest.mark.parametrize("default", [3.0, 3])
def test_options_of_plug_ins_are_tried_with_their_defaults(tmp_path, monkeypatch, default):
    """Not with made-up numbers, which a task may refuse."""
    monkeypatch.setattr(Stops, "options", {"stops": default})
    TASKS.register("stops")(Stops)
    try:
        model = model_of({"stops": {"name": "stops"}})
    finally:
        TASKS.unregister("stops")
    graph = Graph(model, ["stops"])
    assert [value.item() for value in graph.example()[1:]] == [3.0]
    assert parity.check(graph, torch_files.write_pt2(graph, tmp_path / "m.pt2", describe(graph))).difference < 1e-5
    assert cost(model, (16, 16)).parts["tasks.stops"].macs == 4 * 3 * 16 * 16
    tiles = Tiling(model, ["stops"], Setting("exact"), lambda x, options: model.predict(x, ["stops"], options))
    assert tiles.halo is not None
    assert tiles.plan(4000, 4000).windows > 1


# ---- what the core does for it


@pytest.mark.parametrize("up", [3, 5, 6, 24])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_enlargement_by_other_than_powers_of_two_is_exact_in_float32(up, method):
    def enlarge(x):
        return upsample(x, up) if method == "bilinear" else bicubic(x, up=up)

    x = torch.rand(1, 2, 3, 3000, generator=torch.Generator().manual_seed(0))
    exact = enlarge(x.double())
    if method == "bilinear":  # torch's own, which finds places of doubles in double
        own = torch.nn.functional.interpolate(x.double(), scale_factor=float(up), mode=method, align_corners=False)
        assert (exact - own).abs().max() < 1e-12
    assert (enlarge(x) - exact).abs().max() < 1e-6

    class Enlarge(torch.nn.Module):
        def forward(self, x):
            return enlarge(x)

    dims = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Enlarge(), (torch.rand(1, 2, 5, 7),), dynamic_shapes=dims).module()
    assert (program(x) - exact).abs().max() < 1e-6


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_padding_of_a_graph_is_that_of_the_model(multiple):
    class Pad(torch.nn.Module):
        def forward(self, x):
            return pad_to_multiple(x, multiple).clone()

    dims = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Pad(), (torch.rand(1, 2, 5, 7),), dynamic_shapes=dims).module()
    for size in ((3, 9), (8, 16), (2, 4)):
        x = torch.rand(1, 2, *size)
        assert torch.equal(program(x), pad_to_multiple(x, multiple))
