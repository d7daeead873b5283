"""The registry against fake distributions: nothing imported early, no clash silently won, no plug-in fault fatal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

import densectx
from densectx import MODELS, TASKS
from densectx.distributions import FOLDERS, how_to_install
from densectx.errors import ConfigError, PluginError
from densectx.registry import REGISTRIES, Registry, allow_import, documentation

BROKEN = {
    "raises": ("raise ValueError('no luck')", "ValueError: no luck"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "depends": ("import a_module_that_is_not_there", "ModuleNotFoundError"),
    "misspelt": ("def f(:", "SyntaxError"),
    "lacks": ("Other = 1", "AttributeError"),
    "gone": (None, "ModuleNotFoundError"),
}


class Local:
    """A local part."""

    def __init__(self, features, size: int = 3, *rest, **more):
        self.given = (features, size)


@pytest.fixture
def parts():
    return Registry("parts", {"json": "json:dumps", "text": "textwrap:TextWrapper"})


def test_names_are_known_without_import(distribute):
    distribute("plug-a", {"tasks": {"edges": "Task"}, "heads": {"wide": "Task"}}, "raise RuntimeError('imported')")
    assert "edges" in TASKS.names()
    assert "wide" in REGISTRIES["heads"].names()
    entry = TASKS.entry("edges")
    assert (entry.distribution, entry.version, entry.target) == ("plug-a", "1.0", "plug_a:Task")
    assert "plug_a" not in sys.modules


def test_a_plugin_is_built(distribute):
    distribute("plug-a", {"models": {"edges": "Task"}})
    assert MODELS.build("edges", features=1, unused=2).given == (1, 1.0, "a")
    assert MODELS.build({"name": "edges", "mode": "b"}, features=1).given == (1, 1.0, "b")
    assert list(MODELS.options("edges")) == ["features", "weight", "mode"]
    assert documentation(MODELS.get("edges")) == "A task of a plugin."


@pytest.mark.fault("P06")
@pytest.mark.parametrize("kind", [kind for kind in REGISTRIES if kind != "models"])
def test_a_plugin_of_another_class_is_refused(distribute, kind):
    distribute("plug-a", {kind: {"strange": "Task"}})
    registry = REGISTRIES[kind]
    with pytest.raises(
        PluginError, match=rf"{registry.singular} 'strange' gives a Task, which is no densectx\.\w+"
    ) as error:
        registry.build("strange", features=1)
    assert registry.contract.replace(":", ".") in str(error.value)


@pytest.mark.fault("P04")
def test_a_builtin_name_may_be_had_from_a_plugin_by_its_full_name(distribute):
    distribute("plug-a", {"contexts": {"basic": "Mine"}}, "from densectx.nn.context import NoContext as Mine")
    contexts = REGISTRIES["contexts"]
    assert type(contexts.build("plug-a/basic", in_channels=1)).__name__ == "NoContext"
    assert type(contexts.build("densectx/basic", in_channels=1)).__name__ == "ContextModule"
    with pytest.raises(PluginError, match="'densectx/basic' or 'plug-a/basic'"):
        contexts.build("basic", in_channels=1)


@pytest.mark.fault("P03")
@pytest.mark.parametrize("order", [("plug-a", "plug-b"), ("plug-b", "plug-a")])
def test_two_plugins_of_one_name(distribute, order):
    for name in order:
        distribute(name, {"tasks": {"edges": "Task"}}, version={"plug-a": "1.0", "plug-b": "2.5"}[name])
    with pytest.raises(PluginError) as error:
        TASKS.get("edges")
    assert str(error.value) == (
        "task 'edges' is provided by plug-a 1.0 (plug_a:Task) and plug-b 2.5 (plug_b:Task);"
        " write 'plug-a/edges' or 'plug-b/edges', or uninstall one."
    )
    assert TASKS.get("plug-a/edges").__module__ == "plug_a"
    assert TASKS.get("plug-b/edges").__module__ == "plug_b"
    assert TASKS.names().count("edges") == 1


@pytest.mark.fault("P04")
def test_a_plugin_does_not_shadow_a_builtin(distribute):
    distribute("plug-a", {"losses": {"l1": "Task"}})
    losses = REGISTRIES["losses"]
    with pytest.raises(
        PluginError, match=r"densectx .*densectx\.losses\.elementwise:L1.* and plug-a 1\.0 .*'densectx/l1'"
    ):
        losses.get("l1")
    assert losses.get("densectx/l1").__module__ == "densectx.losses.elementwise"
    assert losses.get("plug-a/l1").__module__ == "plug_a"


@pytest.mark.fault("P01")
@pytest.mark.fault("P06")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugins_are_listed_and_refused_when_used(distribute, name):
    source, reason = BROKEN[name]
    distribute(name, {"tasks": {"edges": "Task"}}, source, version="3.1")
    assert "edges" in TASKS.names()
    with pytest.raises(PluginError) as error:
        TASKS.build("edges", features=1)
    for part in (f"{name} 3.1", reason, "edges"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None
    if name in ("raises", "exits", "depends", "misspelt"):  # the tail of the traceback
        assert f"{name}.py, line 1: {source}" in str(error.value)
    assert REGISTRIES["contexts"].get("basic")  # the others work


def test_the_tail_of_a_traceback_goes_down_to_the_cause(distribute):
    source = "def f():\n    return 1 / 0\n\n\nvalue = f()\n"
    distribute("plug-a", {"tasks": {"edges": "Task"}}, source)
    with pytest.raises(
        PluginError, match=r"ZeroDivisionError: division by zero \(.*line 5: value = f\(\); .*line 2: return 1 / 0\)"
    ):
        TASKS.get("edges")


@pytest.mark.fault("P05")
@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        (["densectx>=99"], "needs densectx>=99, this is"),
        (["numpy", "DenseCtx [x] <0"], "needs densectx<0, this is"),
        (["densectx>=0.1", "densectx!=" + densectx.__version__], "needs densectx!="),
        (["densectx => 1"], "its requirement 'densectx => 1' cannot be understood; expected one such as"),
        (["densectx=3"], "'densectx=3' cannot be understood"),
    ],
)
def test_a_plugin_for_another_version_of_densectx(distribute, requires, reason):
    distribute("plug-a", {"tasks": {"edges": "Task"}}, "raise ValueError('imported')", version="2.5", requires=requires)
    for name in ("edges", "plug-a/edges"):
        with pytest.raises(PluginError) as error:
            TASKS.get(name)
        assert error.value.status == 5
        for part in ("plug-a 2.5", reason, "Install a version of plug-a"):
            assert part in str(error.value)
    if "this is" in reason:
        assert densectx.__version__ in str(error.value)
    assert "plug_a" not in sys.modules


@pytest.mark.fault("P05")
@pytest.mark.parametrize(
    "requires", [(), ["numpy>=99"], ["densectx"], ["densectx-extra => 1"], ['densectx>=99; extra == "x"'], ["==bad=="]]
)
def test_a_plugin_that_accepts_this_version(distribute, requires):
    distribute("plug-a", {"tasks": {"edges": "Task"}}, requires=requires)
    assert TASKS.get("edges").__module__ == "plug_a"


def test_what_is_installed_or_removed_meanwhile_is_seen(distribute):
    folder = distribute("plug-a", {"tasks": {"edges": "Task"}})
    assert "edges" in TASKS.names()
    info = folder / "plug_b-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-b\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[densectx.tasks]\nlater = plug_a:Task\n")
    os.utime(folder, ns=(1, 1))  # whatever the resolution of the clock of the file system
    assert "later" in TASKS.names()
    (info / "entry_points.txt").unlink()
    (info / "METADATA").unlink()
    info.rmdir()
    assert "later" not in TASKS.names()


@pytest.mark.fault("P06")
def test_what_is_not_a_class_or_still_abstract_is_refused(distribute):
    source = (
        "from abc import ABC, abstractmethod\nvalue = 3\nclass A(ABC):\n    @abstractmethod\n    def loss(self): ..."
    )
    distribute("plug-a", {"tasks": {"number": "value", "half": "A"}}, source)
    with pytest.raises(PluginError, match=r"'number'.*plug-a 1\.0.*not callable"):
        TASKS.get("number")
    with pytest.raises(PluginError, match=r"'half'.*plug-a 1\.0.*lacks loss"):
        TASKS.get("half")


ABSTRACT = "from abc import ABC, abstractmethod\nclass A(ABC):\n    @abstractmethod\n    def loss(self): ..."


@pytest.mark.fault("P06")
def test_an_abstract_class_is_refused_wherever_it_comes_from(distribute):
    distribute("plug-a", {}, ABSTRACT)
    allow_import("plug_a")
    with pytest.raises(PluginError, match="task 'plug_a:A' lacks loss: an abstract class"):
        TASKS.build("plug_a:A")
    TASKS.register("half")(TASKS._imported("plug_a:A")[0])
    try:
        with pytest.raises(PluginError, match=r"task 'half' \(plug_a:A of plug_a\) lacks loss"):
            TASKS.build("half")
    finally:
        TASKS.unregister("half")


@pytest.mark.fault("P06")
def test_an_error_of_a_plugin_at_building_is_its_own(distribute, parts):
    source = "class A:\n    def __init__(self, size: int = 1, **kwargs):\n        self.given = kwargs['info']"
    distribute("plug-a", {"models": {"mine": "A"}}, source)
    allow_import("plug_a")
    for name, origin in (("mine", r"'mine' \(plug_a:A of plug-a 1.0\)"), ("plug_a:A", "'plug_a:A'")):
        with pytest.raises(
            PluginError, match=rf"model {origin} cannot be built: KeyError: 'info' \(.*line 3: "
        ) as error:
            MODELS.build(name, info=1, size=2)
        assert str(error.value).endswith("Nothing is passed to its **kwargs: name those that it needs of info.")
        assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(TypeError):  # ours are bugs
        parts.build({"name": "json", "obj": object()})


def test_a_group_of_entry_points_that_is_no_kind_is_told(distribute):
    distribute("plug-a", {"task": {"edges": "Task"}})
    with pytest.raises(
        ConfigError, match=r"plug-a 1\.0 has one, but nothing reads 'densectx\.task'; did you mean"
    ) as error:
        TASKS.get("edges")
    assert str(error.value).endswith("did you mean 'densectx.tasks'?")


@pytest.mark.parametrize("name", ["a/b", "a:b"])
def test_a_name_that_nothing_can_ask_for_is_told(distribute, name):
    distribute("plug-a", {"tasks": {name: "Task"}})
    said = "may hold neither '/', which stands behind a distribution, nor ':'"
    with pytest.raises(PluginError, match=said):
        TASKS.register(name)(Local)
    assert [entry.misnamed[:26] for entry in TASKS.entries() if entry.name == name] == ["its name may hold neither "]
    for spec in (name, f"plug-a/{name}") if "/" in name else ():  # with a colon it is a path to import
        with pytest.raises(PluginError, match=rf"task '{name}' \(plug_a:Task of plug-a 1.0\) cannot be used: its name"):
            TASKS.get(spec)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("denoisin", ["'denoisin'", "did you mean 'denoising'?", "colorization", "densectx list tasks"]),
        ("nobody/denoising", ["nobody/denoising"]),
        ({"name": "edges", "wieght": 1}, ["'wieght'", "did you mean 'weight'?", "mode, weight"]),
        ({"name": "edges", "features": 1}, ["'features'", "set by densectx"]),
        ({"weight": 1}, ["'name'", "densectx list tasks"]),
        ({"name": 3}, ["'name'"]),
        (None, ["None"]),
        ([1], ["[1]"]),
    ],
)
def test_bad_specs(distribute, spec, parts):
    distribute("plug-a", {"tasks": {"edges": "Task"}})
    with pytest.raises(ConfigError) as error:
        TASKS.build(spec, where="model.tasks.x", features=1)
    for part in ["model.tasks.x: ", *parts]:
        assert part in str(error.value)


def test_a_missing_option_is_named(distribute):
    distribute("plug-a", {"tasks": {"edges": "Task"}})
    with pytest.raises(ConfigError, match=r"^model: task 'edges' needs 'features'"):
        TASKS.check("edges", where="model")


def test_register_and_unregister(parts):
    assert parts.register("local")(Local) is Local
    parts.register("local")(Local)  # the same object again
    assert parts.names() == ["json", "local", "text"]
    assert parts.build({"name": "local", "size": 5}, features=1).given == (1, 5)
    assert list(parts.options("local")) == ["features", "size"]
    with pytest.raises(PluginError, match=re.escape(Local.__module__)):
        parts.register("local")(partial(Local, size=4))
    with pytest.raises(PluginError, match=r"densectx.*json:dumps"):
        parts.register("json")(Local)
    parts.unregister("local")
    parts.unregister("local")
    assert parts.names() == ["json", "text"]
    assert parts.get("json").__name__ == "dumps"


def test_a_local_name_and_a_plugin(distribute):
    TASKS.register("edges")(Local)
    try:
        distribute("plug-a", {"tasks": {"edges": "Task"}})
        with pytest.raises(PluginError, match="plug-a/edges"):
            TASKS.get("edges")
        assert TASKS.get(f"{Local.__module__}/edges") is Local
    finally:
        TASKS.unregister("edges")


def test_presets_made_with_partial(parts):
    parts.register("preset")(partial(Local, size=7))
    assert parts.build("preset", features=1).given == (1, 7)
    assert documentation(parts.get("preset")) == "A local part."


class Heir(Local):
    """One that inherits its constructor; its class body annotates an attribute of the same name."""

    size: str


def test_an_inherited_constructor_says_what_options_take(parts):
    parts.register("heir")(Heir)
    assert parts.build({"name": "heir", "size": 5}, features=1).given == (1, 5)
    with pytest.raises(ConfigError, match="size: expected a whole number, got 'five'"):
        parts.build({"name": "heir", "size": "five"}, features=1)


def test_a_class_path_needs_an_allowed_package(distribute):
    distribute("plug-free", {}, "class Task: ...\nvalue = 3")
    for target in ("plug_free:Task", "os:system", "builtins:eval", "subprocess:Popen", ":x"):
        with pytest.raises(ConfigError, match="--allow-import"):
            TASKS.get(target)
    assert "plug_free" not in sys.modules
    allow_import("plug_free")
    assert TASKS.get("plug_free:Task").__name__ == "Task"
    for target in ("plug_free:Tsak", "plug_free.x:Task", "plug_free:value", "plug_free:"):
        with pytest.raises(ConfigError, match="plug_free"):
            TASKS.get(target)
    with pytest.raises(ConfigError, match="--allow-import plug_freer"):
        TASKS.get("plug_freer:Task")


def test_importing_densectx_and_listing_import_no_torch():
    code = """
import sys, densectx, densectx.cli, densectx.config, densectx.arguments
assert densectx.cli.main(["list"]) == 0
heavy = {"torch", "pytorch_lightning", "timm", "kornia", "numpy", "jsonargparse"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("plug-a", "pip install plug-a"),
        ("plug-a>=2", "pip install 'plug-a>=2'"),
        ("densectxtra", "pip install densectxtra"),
        (
            "densectx-edges >= 0.1",
            "pip install ./plugins/densectx-edges in a checkout of densectx (densectx-edges is not on PyPI)",
        ),
        ("DenseCtx_Edges", "pip install ./plugins/densectx-edges in a checkout of densectx"),
        ("densectx[export]", "pip install '.[export]' in a checkout of densectx (densectx is not on PyPI)"),
        ("densectx-template", "pip install ./plugins/template in a checkout of densectx"),
        ("densectx-mine>=1", "pip install 'densectx-mine>=1'"),
    ],
)
def test_what_is_not_on_pypi_is_installed_from_a_checkout(requirement, said):
    assert how_to_install(requirement).startswith(said)


def test_the_folders_of_the_repository_are_known():
    root = Path(__file__).parents[1]
    found = {tomllib.loads(file.read_text())["project"]["name"]: file.parent for file in root.glob("**/pyproject.toml")}
    assert found == {name: root / folder for name, folder in FOLDERS.items()}
