"""The README's code is run, and what it names exists."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml

import densectx
from densectx.cli import COMMANDS
from densectx.data.mosaic import SOURCES
from densectx.losses import Criterion
from densectx.registry import REGISTRIES
from densectx.testing import check_head

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def recipe():
    """Runs the recipe of a kind and registers its class under the name that the README gives it."""
    registered = []

    def recipe(kind):
        (block,) = [block for block in BLOCKS if f'entry-points."densectx.{kind}"' in block]
        name, attribute = re.search(r'(\w+) = "my_package:(\w+)"', block).groups()
        namespace = {"__name__": "my_package"}
        exec(compile(block, f"README {kind}", "exec"), namespace)
        REGISTRIES[kind].register(name)(namespace[attribute])
        registered.append((kind, name))
        return name

    yield recipe
    for kind, name in registered:
        REGISTRIES[kind].unregister(name)


def test_recipes_train_together(recipe, tmp_path):
    backbone, dataset, head, loss = (recipe(kind) for kind in ("backbones", "datasets", "heads", "losses"))
    data = densectx.DataModule({"s": {"name": dataset, "size": 16, "length": 4, "batch_size": 2}}, num_workers=0)
    tasks = {
        "segmentation": {"name": "segmentation", "source": "s", "head": head},
        "denoising": {"name": "denoising", "source": "s", "loss": {"name": loss, "delta": 0.2}},
    }
    config = {"backbone": {"name": backbone, "width": 8}, "projection": {"channels": 8}, "tasks": tasks}
    model = densectx.DenseModel.from_config(config, data.info())
    module = densectx.DenseModule(model, lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", use_distributed_sampler=False, logger=False, default_root_dir=tmp_path
    )
    trainer.fit(module, datamodule=data)
    assert {"val/segmentation/miou", "val/denoising/psnr"} <= set(trainer.validate(module, data, verbose=False)[0])
    assert model.predict(torch.rand(3, 13, 9))["segmentation"].shape == (2, 13, 9)


def test_head_recipe_is_right(recipe):
    check_head(recipe("heads"))


def test_loss_recipe_equals_torch(recipe):
    criterion = Criterion(recipe("losses"))
    output, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    total, weight = criterion(output, target)["huber"]
    assert torch.allclose(total / weight, torch.nn.functional.huber_loss(output, target, delta=0.1))
    total, weight = criterion(output, torch.full_like(target, torch.nan))["huber"]
    assert total == weight == 0


def test_python_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in BLOCKS if "pl.Trainer(" in block]
    namespace = {}
    exec(compile(block.replace("max_steps=20", "max_steps=1, accelerator='cpu'"), "README", "exec"), namespace)
    assert namespace["clean"].shape == (3, 120, 90)
    (block,) = [block for block in BLOCKS if "optimizer.step()" in block]
    before = [weights.clone() for weights in namespace["model"].parameters()]
    exec(
        compile(block.replace("data.train_dataloader()", "[next(iter(data.train_dataloader()))]"), "README", "exec"),
        namespace,
    )
    assert any(not torch.equal(old, new) for old, new in zip(before, namespace["model"].parameters(), strict=True))
    assert namespace["model"].task("denoising").metrics.compute()["psnr"] > 5


def test_commands_of_the_readme_exist():
    named = {name for group in re.findall(r"`densectx ([a-z\\|]+)", README) for name in re.split(r"[\\|]+", group)}
    assert named == set(COMMANDS)


def test_terms_of_the_photographs_are_stated():
    free, cc0 = re.search(r"Terms: (.*?) are in the\s+public domain; (.*?) are CC0", README, re.DOTALL).groups()
    for name, source in SOURCES.items():
        assert name in (cc0 if source.terms == "CC0" else free)


def test_every_backbone_context_and_task_is_mentioned():
    text = README.replace("dilated_resnet18/34/50/101", "dilated_resnet18`, `dilated_resnet34/50/101")
    text = text.replace("dilated_resnet34/50/101", "dilated_resnet34`, `dilated_resnet50`, `dilated_resnet101")
    for kind in ("backbones", "contexts", "tasks"):
        for name in REGISTRIES[kind].names():
            assert re.search(rf"`({{name: )?{name}\b", text), name


def test_exit_statuses_are_the_ones_of_the_errors():
    from densectx import errors

    (line,) = re.findall(r"Exit status: (.*?)\n\n", README, re.DOTALL)
    told = {int(number) for number in re.findall(r"\b(\d+) (?=\w)", line)}
    raised = {
        error.status
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.DensectxError)
    }
    assert told >= raised
    assert told - raised <= {0, 1, 130, 143}


def test_the_yaml_of_the_readme_builds():
    own, *blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
    assert own == yaml.safe_load((ROOT / "configs" / "segmentation_folder.yaml").read_text())
    tasks = next(block for block in blocks if "segmentation" in block)
    sources = next(block for block in blocks if "scenes" in block)
    assert len(blocks) == 2, "every block is tested here"
    data = densectx.DataModule(sources | {"photos": {"name": "folder", "root": "photos", "batch_size": 1}})
    config = {"backbone": {"name": "plain", "width": 4}, "projection": {"channels": 4}, "tasks": tasks}
    model = densectx.DenseModel.from_config(config, data.info())
    assert list(model.task("segmentation").coefficients.items()) == [("cross_entropy", 1.0), ("lovasz", 0.5)]
    assert model.task("segmentation").info.classes == ("road", "person", "other")


def test_the_kit_of_the_readme_runs():
    (block,) = [block for block in BLOCKS if "densectx.testing" in block]
    exec(compile(block, "README kit", "exec"), {})


def test_what_the_readme_says_of_coverage_holds():
    (block,) = [block for block in BLOCKS if "coverage(" in block]
    exec(compile(block, "README", "exec"), {})
