"""The parts keep the contracts of densectx, and do what they are for."""

from pathlib import Path

import pytest
import torch

import densectx
from densectx.config import compose
from densectx.errors import ConfigError
from densectx.model import DenseModel
from densectx.testing import check_dataset, check_task

CONFIG = Path(__file__).parents[1] / "configs" / "degamma.yaml"


def test_task():
    check_task("degamma")


def test_dataset():
    check_dataset({"name": "gradients", "size": 16, "length": 8})


def test_config_builds():
    values = compose([CONFIG]).values
    sources = densectx.DataModule(**values["data"]).info()
    model = {key: values["model"][key] for key in ("backbone", "projection", "context", "tasks")}
    assert list(DenseModel.from_config(model, sources).tasks) == ["degamma"]


def test_splits_share_no_picture():
    train, val = (densectx.DATASETS.build("gradients", split=split) for split in ("train", "val"))
    assert not torch.equal(train[0]["image"], val[0]["image"])


def test_refused():
    with pytest.raises(ConfigError, match="size 1"):
        densectx.DATASETS.build({"name": "gradients", "size": 1}, split="train")
    info = densectx.DATASETS.build("gradients", split="train").info
    config = {
        "backbone": {"name": "plain", "width": 4},
        "projection": None,
        "tasks": {"degamma": {"name": "degamma", "source": "gradients", "strength": 0.0}},
    }
    with pytest.raises(ConfigError, match="strength 0"):
        DenseModel.from_config(config, {"gradients": info})
