"""Features of frozen layers are computed once, are the same to the bit, and are never another front end's."""

import contextlib
import os

import pytest
import pytorch_lightning as pl
import torch

import densectx
from densectx.checkpoint import init_from, save_safetensors
from densectx.errors import ConfigError, StorageError
from densectx.feature_cache import FeatureCache
from densectx.nn.context import ContextModule

FREEZE = ("backbone", "projection")
TASK = {"name": "segmentation", "source": "m", "head": "upsample"}


def make(folder, *, seed=0, augment=None, freeze=FREEZE, tasks=None, batch_size=2, **model):
    """Data and module: a backbone with dropout and batch norm in it, frozen."""
    source = {"name": "mosaic", "size": [20, 28], "length": 4, "val_length": 3, "batch_size": batch_size}
    data = densectx.DataModule({"m": {**source, "augment": augment}}, num_workers=0)
    config = {
        "backbone": {"name": "frontend_vgg16", "width": 2, "fc": 6, "padding": "each", "norm": "batch"},
        "projection": {"channels": 10, "activation": "none"},
        "context": "context7",
        "tasks": tasks or {"seg": TASK},
        **model,
    }
    torch.manual_seed(seed)
    built = densectx.DenseModel.from_config(config, data.info())
    module = densectx.DenseModule(
        built,
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        freeze=freeze,
        cache_features=None if folder is None else str(folder),
    )
    return data, module


def fit(data, module, steps, tmp_path):
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@contextlib.contextmanager
def counted(module):
    """The sizes of the batches that the backbone sees."""
    seen = []
    handle = module.model.backbone.register_forward_hook(lambda layer, given, answer: seen.append(len(given[0])))
    yield seen
    handle.remove()


def entries(folder):
    return sorted(folder.glob("*/*.features"))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_training_is_the_same_with_and_without(tmp_path, batch_size):
    """To the bit; convolutions of larger batches round otherwise than those of their images, one by one."""
    found = []
    for folder in (None, tmp_path / "kept", tmp_path / "kept"):  # without, while it fills, when it is full
        data, module = make(folder, augment={"flip": True}, batch_size=batch_size)
        metrics = fit(data, module, 8, tmp_path)
        found.append((module.model.state_dict(), metrics))
    assert module.features.computed == 0
    first = make(None)[1].model.state_dict()
    assert any(not torch.equal(found[0][0][key], value) for key, value in first.items()), "it was trained"
    for (state, metrics), (other, values), exact in ((found[2], found[1], True), (found[1], found[0], batch_size == 1)):
        if exact:
            assert str(metrics) == str(values)  # as text: classes that do not occur are NaN
        for key, value in state.items():
            torch.testing.assert_close(value, other[key], **({"rtol": 0, "atol": 0} if exact else {}))


def test_the_second_epoch_runs_no_backbone(tmp_path):
    data, module = make(tmp_path / "kept")
    with counted(module) as seen:
        fit(data, module, 2, tmp_path)  # an epoch, and its validation
        assert seen == [1] * 7  # 4 images for training, 3 for validation, one at a time
        fit(data, module, 6, tmp_path)
        assert seen == [1] * 7
    assert len(entries(tmp_path / "kept")) == 7


def test_a_mirrored_image_is_another_entry(tmp_path):
    data, module = make(tmp_path / "kept", augment={"flip": True})
    with counted(module) as seen:
        fit(data, module, 40, tmp_path)
    assert len(seen) == 2 * 4 + 3
    assert module.features.read == 40 * 2 + 20 * 3 - len(seen)


def test_how_often_it_helped_is_said(tmp_path, caplog):
    data, module = make(tmp_path / "kept")
    with caplog.at_level("INFO"):
        fit(data, module, 4, tmp_path)
    assert f"model.cache_features {tmp_path / 'kept'}: 7 read, 7 computed." in caplog.text


@pytest.fixture
def asked(tmp_path):
    """Ask a module's cache for the features of a picture; returns them and whether they were computed."""

    def asked(module, x, surround=0):
        before = module.features.computed
        features = module.features(x, surround, lambda part: module.model.trunk(part, None, surround)[-1])
        return features, module.features.computed > before

    return asked


def test_other_weights_configs_inputs_and_precisions_are_noticed(tmp_path, asked):
    folder, x = tmp_path / "kept", torch.rand(1, 3, 16, 16)
    _, module = make(folder)
    first, new = asked(module, x)
    assert new
    assert not asked(module, x)[1]
    assert not asked(make(folder)[1], x)[1]  # the same network built again
    for changed in (x.flip(-1), x[..., :8], x.double().float() + 1e-7):
        assert asked(module, changed)[1]
    assert asked(module, x, 4)[1]  # the border is something else
    with torch.autocast("cpu", torch.bfloat16):
        half, new = asked(module, x)
        assert new
        assert half.dtype == torch.bfloat16
        again, new = asked(module, x)
        assert not new
        assert torch.equal(half, again)
    assert asked(make(folder, seed=1)[1], x)[1]
    backbone = {"name": "frontend_vgg16", "width": 2, "fc": 6, "padding": "each", "norm": "batch"}
    assert asked(make(folder, backbone={**backbone, "mean": [1.0, 2.0, 3.0]})[1], x)[1]  # no weight, no shape differs
    weight = module.model.projection.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += 1e-3
    other, new = asked(module, x)
    assert new
    assert not torch.equal(other, first)
    module.model.backbone.norms["fc7"].running_mean += 1  # no parameter
    assert asked(module, x)[1]
    module.model.backbone.norms["fc7"].running_mean -= 1
    with torch.no_grad():
        weight.copy_(kept)
    again, new = asked(module, x)
    assert not new
    assert torch.equal(again, first)


def test_weights_that_came_from_elsewhere_are_the_same_weights(tmp_path, asked):
    _, module = make(tmp_path / "kept")
    x = torch.rand(1, 3, 16, 16)
    first, _ = asked(module, x)
    save_safetensors(module.model, tmp_path / "m.safetensors")
    _, other = make(tmp_path / "kept", seed=5)
    init_from(other.model, tmp_path / "m.safetensors")
    again, new = asked(other, x)
    assert not new
    assert torch.equal(again, first)


def test_a_batch_is_its_images_and_nothing_is_random(tmp_path, asked):
    _, module = make(tmp_path / "kept")
    module.train()  # as nothing calls eval() when a step is taken by hand
    x = torch.rand(3, 3, 16, 24)
    together, _ = asked(module, x)
    assert module.model.backbone.training
    assert len(entries(tmp_path / "kept")) == 3
    alone = torch.cat([asked(make(tmp_path / "other")[1], one[None])[0] for one in x])
    assert torch.equal(together, alone)
    with torch.no_grad():
        expected = module.eval().model.trunk(x)[-1]
    torch.testing.assert_close(together, expected)
    assert not asked(module, x.to(memory_format=torch.channels_last))[1]


@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_read_lies_in_memory_like_what_was_computed(tmp_path, asked, channels_last):
    """As without a cache: else what is computed from it rounds otherwise."""
    model, options = make(None)[1].model, {"freeze": FREEZE, "cache_features": str(tmp_path / "kept")}
    module = densectx.DenseModule(model, torch.optim.SGD, channels_last=channels_last, **options)
    x = torch.rand(2, 3, 16, 24)
    computed, read = (asked(module, x)[0] for _ in range(2))
    with torch.no_grad():
        expected = module.eval().model.trunk(x)[-1]
    assert computed.stride() == read.stride() == expected.stride()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_damaged_entries_are_said_and_computed_again(tmp_path, asked, damage, capsys):
    folder, x = tmp_path / "kept", torch.rand(1, 3, 16, 16)
    _, module = make(folder)
    first, _ = asked(module, x)
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 4
    entry.write_bytes({"cut": whole[:-9], "flipped": bytes(flipped), "empty": b"", "foreign": b"x" * 300}[damage])
    again, new = asked(module, x)
    assert new
    assert torch.equal(again, first)
    assert f"{entry} is damaged; computed again." in capsys.readouterr().err
    assert entry.read_bytes() == whole
    assert not asked(module, x)[1]
    assert not capsys.readouterr().err
    assert [file.name for file in entry.parent.iterdir()] == [entry.name], "no half-written file is left"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path, asked):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"model.cache_features: .*kept cannot be written"):
        asked(make(tmp_path / "kept")[1], torch.rand(1, 3, 16, 16))


def test_a_file_in_the_place_of_the_folder(tmp_path, asked):
    (tmp_path / "kept").write_text("")
    with pytest.raises(StorageError, match=r"model.cache_features: .*kept cannot be written"):
        asked(make(tmp_path / "kept")[1], torch.rand(1, 3, 16, 16))


DENOISING = {"name": "denoising", "source": "m", "head": "linear"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ()}, r"backbone and projection is not frozen; set model.freeze: \[backbone, projection\]"),
        ({"freeze": ("backbone",)}, "and projection is not frozen"),
        ({"freeze": ("backbone.layers", "projection")}, "and backbone is not frozen"),
        ({"tasks": {"seg": {**TASK, "head": "decoder"}}}, "head of task 'seg' reads the backbone's finer levels"),
        ({"tasks": {"seg": TASK, "denoise": DENOISING}}, "task 'denoise' changes its input"),
        ({"norm": "per_input"}, "norm: per_input"),
        ({"ablate": "trunk_zero"}, "ablate leaves no features"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=f"^model.cache_features: .*{message}"):
        make(tmp_path / "kept", **options)
    assert not (tmp_path / "kept").exists()


def test_no_projection_need_be_frozen_where_there_is_none(tmp_path):
    backbone = {"name": "frontend_vgg16", "width": 2, "fc": 10, "padding": "each"}
    _, module = make(tmp_path / "kept", freeze=("backbone",), projection=None, backbone=backbone)
    assert isinstance(module.features, FeatureCache)


def test_the_rest_is_trained(tmp_path):
    data, module = make(tmp_path / "kept")
    before = {key: value.clone() for key, value in module.model.state_dict().items()}
    fit(data, module, 4, tmp_path)
    changed = {key.partition(".")[0] for key, v in module.model.state_dict().items() if not torch.equal(before[key], v)}
    assert changed == {"context"}
    assert isinstance(module.model.context["shared"], ContextModule)


def test_a_model_of_its_own_knows_no_folder(tmp_path):
    _, module = make(tmp_path / "kept")
    save_safetensors(module.model, tmp_path / "m.safetensors")
    densectx.load(tmp_path / "m.safetensors").predict(torch.rand(3, 16, 16))
    assert not (tmp_path / "kept").exists()
