"""The package lists what it ships and nothing else; what it ships loads."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

import densectx
from densectx.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("installed")

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parents[1]
NAMES = ("denoise-gray", "denoise-color", "sr-x2", "sr-x3", "sr-x4", "colorize", "segment-camvid", "multitask")
SHIPPED = sorted(file.stem for file in (PACKAGE / "densectx_zoo" / "weights").glob("*.safetensors"))


@pytest.fixture
def zoo():
    """The module, imported once it can be found."""
    import densectx_zoo

    return densectx_zoo


def entry_points():
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    return project.get("entry-points", {}).get("densectx.models", {})


def test_entry_points_are_those_of_the_files():
    assert sorted(entry_points()) == SHIPPED
    assert set(SHIPPED) <= set(NAMES)


def test_every_file_has_a_card_and_stands_in_the_readme():
    cards = sorted(file.stem for file in (PACKAGE / "densectx_zoo" / "cards").glob("*.md"))
    assert cards == SHIPPED
    table = (PACKAGE / "README.md").read_text().partition("<!-- models -->")[2].partition("<!-- end of models -->")[0]
    assert sorted(re.findall(r"\| \[`([\w-]+)`\]", table)) == SHIPPED


def test_small_enough():
    sizes = [(PACKAGE / "densectx_zoo" / "weights" / f"{name}.safetensors").stat().st_size for name in SHIPPED]
    assert max(sizes, default=0) <= 4_000_000
    assert sum(sizes) <= 20_000_000


@pytest.mark.parametrize("name", NAMES)
def test_a_function_gives_the_file_or_says_how_to_make_it(zoo, name):
    function = getattr(zoo, name.replace("-", "_"))
    if name in SHIPPED:
        assert function() == Path(zoo.__file__).parent / "weights" / f"{name}.safetensors"
        return
    with pytest.raises(CheckpointError) as caught:
        function()
    recipe = re.search(r"configs/recipes/\w+\.yaml", str(caught.value))
    assert name in str(caught.value)
    assert (ROOT / recipe.group()).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_loads_or_is_unknown(name):
    if name in SHIPPED:
        model = densectx.load(name)
        for key, answer in model.predict(torch.rand(3, 33, 47)).items():
            assert answer.shape[1:] == (33 * model.task(key).scale, 47 * model.task(key).scale)
            assert answer.isfinite().all()
        return
    assert name not in densectx.MODELS.names()
    with pytest.raises(CheckpointError, match="no such file, run folder or model name"):
        densectx.load(name)
