"""``model.name``: a config that starts from a named model, of a config and of a file."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import densectx
from densectx import cli, model_names
from densectx.checkpoint import locate, save_safetensors
from densectx.config import compose
from densectx.errors import CheckpointError, ConfigError, PluginError
from densectx.imports import allow_import
from densectx.inspection.subject import subject_of
from densectx.published.plan import Net
from densectx.registry import MODELS
from densectx.types import SourceInfo

NAMES = ("astronaut", "brick", "camera")
INFO = SourceInfo(classes=NAMES, palette=((1, 2, 3),) * 3, keys=("image", "mask"))
NET = {
    "backbone": {"name": "plain", "width": 6, "depth": 2},
    "projection": {"channels": 3, "activation": "none"},
    "context": {"name": "large", "padding": "once", "dilations": [1, 2], "widths": [1, 2]},
    "tasks": {"segmentation": {"name": "segmentation", "source": "scenes", "head": "upsample"}},
    "sources": {"scenes": INFO.to_config()},
}
OTHER = {**NET, "backbone": {"name": "plain", "width": 4}, "norm": "group"}

CONFIG = """
model:
  name: test-net
  backbone: {width: 8}
  tasks: {segmentation: {source: photos}}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}
data:
  sources: {photos: {name: mosaic, size: 24, length: 4, val_length: 2, names: [astronaut, brick, camera]}}
  num_workers: 0
trainer:
  {accelerator: cpu, max_steps: 2, val_check_interval: 2, check_val_every_n_epoch: null, enable_progress_bar: false}
"""


def net():
    return NET


def other():
    return OTHER


@pytest.fixture(autouse=True)
def named(tmp_path, monkeypatch):
    """The models of this file, and a file CONFIG in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(CONFIG)
    sources = {"scenes": INFO}
    model = densectx.DenseModel.from_config({k: v for k, v in NET.items() if k != "sources"}, sources)
    save_safetensors(model, tmp_path / "whole.safetensors")
    MODELS.register("test-net")(net)
    MODELS.register("test-other")(other)
    whole = MODELS.register("test-whole")(lambda: tmp_path / "whole.safetensors")
    MODELS.register("test-nothing")(lambda: {"tasks": {}})
    yield whole
    for name in ("net", "other", "whole", "nothing"):
        MODELS.unregister(f"test-{name}")


@pytest.fixture
def merged(tmp_path):
    """Files given as texts, then flags."""

    def merged(*texts, flags=()):
        files = [tmp_path / f"{index}.yaml" for index in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        return compose(files, flags)

    return merged


def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECTX_RUN", "")
        status = cli.main(list(map(str, arguments)))
    return status, out.getvalue(), err.getvalue()


PLAIN = {key: value for key, value in NET.items() if key != "sources"}


@pytest.mark.parametrize(
    ("texts", "flags", "changed"),
    [
        (["model: {name: test-net}"], [], {}),
        (["model: test-net"], [], {}),
        (["{}"], [("model.name", "test-net")], {}),
        (["{}"], [("model", "test-net"), ("model.norm", "group")], {"norm": "group"}),
        # what files say is merged onto it, also what comes before the name
        (["model: {norm: group}", "model: {name: test-net}"], [], {"norm": "group"}),
        (
            ["model: {name: test-net, backbone: {width: 9}}"],
            [("model.backbone.depth", "1")],
            {"backbone": {"name": "plain", "width": 9, "depth": 1}},
        ),
        (["model: {name: test-net, context: none}"], [], {"context": {"name": "none"}}),
        (["model: {name: test-net}", "model: {context: {name: basic}}"], [], {"context": {"name": "basic"}}),
        (["model: {name: test-net}", "model: {projection: null}"], [], {"projection": None}),
        (["model: {name: test-net, tasks: {segmentation: null}}"], [], {"tasks": {}}),
        (
            ["model: {name: test-net, tasks: {denoise: {name: denoising}, segmentation: {source: a}}}"],
            [],
            {
                "tasks": {
                    "segmentation": {"name": "segmentation", "source": "a", "head": "upsample"},
                    "denoise": {"name": "denoising"},
                }
            },
        ),
        # another name forgets what earlier files said of the model
        (["model: {name: test-other, norm: none}", "model: {name: test-net}"], [], {}),
        (["model: {name: test-other, norm: none}", "model: {balancing: fixed}"], [("model.name", "test-net")], {}),
        (["model: {name: test-net, norm: none}", "model: {name: test-net}"], [], {"norm": "none"}),
    ],
)
def test_merging(merged, texts, flags, changed):
    composed = merged(*texts, flags=flags)
    assert composed.values == {"model": {**PLAIN, **changed}}
    assert composed.base.name == "test-net"
    assert NET["backbone"] == {"name": "plain", "width": 6, "depth": 2}, "the registered config is left alone"


def test_every_value_says_where_it_is_from(merged, tmp_path):
    composed = merged("model: {name: test-net, backbone: {width: 9}}", flags=[("model.backbone.depth", "1")])
    assert composed.where("model.context.padding") == "model test-net"
    assert composed.where("model.backbone.width") == f"file {tmp_path / '0.yaml'}"
    assert composed.where("model.backbone.depth") == "flag"


def test_references_see_it(merged):
    values = merged("model: {name: test-net}\ndata: {k: '${model.projection.channels}'}").values
    assert values["data"] == {"k": 3}


def test_a_config_without_a_name_is_as_before(merged):
    composed = merged("model: {backbone: plain}\nx: '${model.backbone}'")
    assert (composed.base, composed.values) == (None, {"model": {"backbone": "plain"}, "x": "plain"})


def test_a_file_gives_its_config_and_its_weights(merged):
    composed = merged("model: {name: test-whole}")
    assert composed.values == {"model": {**PLAIN, "norm": "batch", "ablate": None}, "init_from": "test-whole"} or (
        composed.values == {"model": PLAIN, "init_from": "test-whole"}
    )
    assert merged("model: {name: test-whole}\ninit_from: x").values["init_from"] == "x"
    assert merged("model: {name: test-whole}", flags=[("init_from", "null")]).values["init_from"] is None
    assert "init_from" not in merged("model: {name: test-net}").values


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "model: {name: test-nett}",
            ConfigError,
            r"model.name: unknown model 'test-nett'; did you mean 'test-net'.*0.yaml",
        ),
        ("model: {name: [1]}", ConfigError, r"model.name: expected a name of `densectx list models`, got \[1\]"),
        ("model: {name: null}", ConfigError, "model.name: expected a name"),
        ("model: {name: '${x}'}\nx: test-net", ConfigError, "model.name: .* is not known before the files are merged"),
        ("model: {name: test-nothing}", PluginError, "gives neither a model config nor a file"),
    ],
)
def test_what_is_no_name(merged, text, error, message):
    with pytest.raises(error, match=message):
        merged(text)


def test_composing_needs_no_torch(tmp_path):
    (tmp_path / "b.yaml").write_text("model: {name: dilation8_camvid}")
    code = "import sys; from densectx.config import compose; v = compose(['b.yaml']).values"
    code += "; print(v['model']['projection']['channels'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["11", "False"]


# the command ---------------------------------------------------------------------------------------------------------


def test_what_is_printed_is_all_there_is(tmp_path):
    status, out, err = command("fit", "-c", "a.yaml", "--print_config")
    assert status == 0, err
    printed = yaml.safe_load(out)
    assert printed["model"]["backbone"] == {"name": "plain", "width": 8, "depth": 2}
    assert "name" not in printed["model"]
    (tmp_path / "printed.yaml").write_text(out)
    assert compose(["printed.yaml"]).values == compose(["a.yaml"]).values


def test_a_run_goes_on_and_is_validated_with_either_config(capfd):
    status, _, err = command("fit", "-c", "a.yaml")
    assert status == 0, err
    run = "runs/a/0"
    saved, own = compose([f"{run}/config.yaml"]).values, compose(["a.yaml"]).values
    assert saved == own
    # the named model changes after the run: the run does not
    MODELS.unregister("test-net")
    MODELS.register("test-net")(other)
    meant = ("--allow-changed", "trainer.max_steps")
    status, _, err = command("fit", "--resume", run, "--trainer.max_steps", "4", *meant)
    assert status == 0, err
    MODELS.unregister("test-net")
    MODELS.register("test-net")(net)
    status, _, err = command("fit", "-c", "a.yaml", "--resume", run, "--trainer.max_steps", "6", *meant)
    assert status == 0, err
    for config in ("a.yaml", f"{run}/config.yaml"):
        status, validated, err = command("validate", "-c", config, "--ckpt_path", run)
        assert status == 0, err
        assert "miou" in validated
    assert densectx.load(run).predict(torch.rand(3, 9, 9))["segmentation"].shape == (3, 9, 9)


def test_weights_of_a_named_file_are_where_training_starts(tmp_path, caplog):
    (tmp_path / "whole.yaml").write_text(CONFIG.replace("test-net", "test-whole").replace("{width: 8}", "plain"))
    status, _, err = command("validate", "-c", "whole.yaml")
    assert status == 0, err
    status, _, err = command("fit", "-c", "whole.yaml", "--model.optimizer.init_args.lr", "0")
    assert status == 0, err
    assert "init_from test-whole: 12 of 12 tensors taken" in caplog.text
    first, last = densectx.load("whole.safetensors"), densectx.load("runs/whole/0")
    for key, value in last.state_dict().items():
        assert torch.equal(value, first.state_dict()[key]), key


OTHER_CLASSES = ("--data.sources.photos.names", "[astronaut, brick, grass, hubble]")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (OTHER_CLASSES, ["3 classes (astronaut, brick, camera)", "4 classes (astronaut, brick, grass, hubble)"]),
        (["--data.sources.photos.names", "[brick, astronaut, camera]"], ["3 classes (brick, astronaut, camera)"]),
    ],
)
def test_data_of_other_classes_is_refused_before_anything_is_built(flags, words):
    status, _, err = command("fit", "-c", "a.yaml", *flags)
    assert status == 2
    assert err.splitlines()[-1].startswith("densectx: error: model.tasks.segmentation: model 'test-net' has 3 classes")
    for word in (*words, "'photos'", "model.tasks.segmentation.classes: "):
        assert word in err
    assert "Traceback" not in err


def test_other_classes_can_be_meant():
    flags = (*OTHER_CLASSES, "--model.tasks.segmentation.classes", "4", "--model.projection.channels", "4")
    status, _, err = command("fit", "-c", "a.yaml", *flags)
    assert status == 0, err
    assert densectx.load("runs/a/0").predict(torch.rand(3, 9, 9))["segmentation"].shape == (4, 9, 9)


def test_a_task_that_learns_no_classes_takes_data_of_any():
    restores = {"name": "denoising", "source": "plain", "sigma": 25}
    plain = SourceInfo(keys=("image",)).to_config()
    MODELS.register("test-denoiser")(lambda: {**NET, "tasks": {"denoising": restores}, "sources": {"plain": plain}})
    Path("restore.yaml").write_text(CONFIG.replace("test-net", "test-denoiser").replace("segmentation", "denoising"))
    try:
        status, _, err = command("fit", "-c", "restore.yaml", "--no-report")
    finally:
        MODELS.unregister("test-denoiser")
    assert status == 0, err


def test_a_misspelt_name_key_is_told():
    status, _, err = command("fit", "-c", "a.yaml", "--model.nmae", "test-net")
    assert status == 2
    assert "unknown key 'model.nmae' (flag); did you mean 'name'?" in err


def test_a_missing_model_of_the_zoo_is_said_where_to_get(distribute):
    fix = "pip install ./plugins/densectx-zoo in a checkout of densectx"
    for refused in (lambda: densectx.load("denoise-gray"), lambda: model_names.named("denoise-gray")):
        with pytest.raises((CheckpointError, ConfigError), match=f"is a model name of densectx-zoo: {fix}"):
            refused()
    with pytest.raises(CheckpointError) as error:
        densectx.load("denoise-grey")
    assert "densectx-zoo" not in str(error.value)
    distribute("densectx-zoo", {"models": {"sr-x2": "Task"}})
    with pytest.raises(CheckpointError, match=r"densectx-zoo 1\.0 is installed and has no model 'denoise-gray' yet"):
        densectx.load("denoise-gray")


def test_a_folder_of_a_models_name_does_not_hide_it(tmp_path):
    (tmp_path / "test-whole").mkdir()  # where an earlier predict put its answers
    assert locate("test-whole") == tmp_path / "whole.safetensors"
    (tmp_path / "else").mkdir()
    with pytest.raises(CheckpointError, match="a folder without checkpoints"):
        locate("else")


GIVES = """
from pathlib import Path

def config():
    return {"backbone": "plain", "context": "none", "tasks": {"denoising": {"name": "denoising", "source": "s"}},
            "sources": {"s": {"keys": ["image"]}}}

def whole():
    return Path("whole.safetensors")

def broken():
    raise FileNotFoundError("weights/net.safetensors")

def nothing():
    return 3
"""


@pytest.fixture
def two_packages(distribute):
    """Two packages that provide models of the same names."""
    for name in ("plug-one", "plug-two"):
        distribute(name, {"models": {key: key for key in ("config", "whole", "broken", "nothing")}}, GIVES)


@pytest.mark.usefixtures("two_packages")
def test_a_clash_is_settled_by_the_full_name_wherever_a_name_goes(tmp_path):
    with pytest.raises(PluginError, match="write 'plug-one/whole' or 'plug-two/whole'"):
        densectx.load("whole")
    allow_import("plug_two")
    for name in ("plug-one/whole", "plug_two:whole"):
        assert densectx.load(name).predict(torch.rand(3, 9, 9))["segmentation"].shape == (3, 9, 9)
        assert subject_of(name).kind == "weights"
    for name in ("plug-two/config", "plug_two:config"):
        assert subject_of(name).kind == "config"
        with pytest.raises(CheckpointError, match="comes without weights"):
            densectx.load(name)
    (tmp_path / "plug-one" / "whole").mkdir(parents=True)  # where an earlier predict put its answers
    assert locate("plug-one/whole").name == "whole.safetensors"
    for name in ("plug-one/else", "plug_tow:whole"):
        with pytest.raises(CheckpointError, match="no such file, run folder or model name"):
            densectx.load(name)


@pytest.mark.fault("P01")
@pytest.mark.usefixtures("two_packages")
@pytest.mark.parametrize("use", [densectx.load, model_names.named, Net.of])
def test_an_entry_that_fails_is_the_packages_fault(use):
    with pytest.raises(PluginError) as error:
        use("plug-one/broken")
    assert str(error.value).startswith(
        "model 'plug-one/broken' of plug-one 1.0: FileNotFoundError: weights/net.safetensors ("
    )
    with pytest.raises(PluginError, match=r"of plug-two 1\.0 gives neither a model config nor a file, but 3"):
        use("plug-two/nothing")
