"""What may import what, and what is never written, checked on the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "densectx"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {
    "registry",
    "builtin",
    "distributions",
    "imports",
    "typecheck",
    "types",
    "palette",
    "errors",
    "rng",
    "archive",
    "seal",
    "memory",
}
PARTS = {"backbones", "heads", "losses", "metrics"}
ABOVE = {"inference", "export", "inspection", "published", "report", "demo", "surgery"}
TRAINING = {
    "averaging",
    "module",
    "training",
    "cli",
    "callbacks",
    "balancing",
    "accumulation",
    "normalising",
    "optimizing",
    "checkpointing",
    "checkpoint_io",
    "resilience",
    "resuming",
    "feature_cache",
    "surround",
    "runs",
    "optimizers",
    "schedules",
    "building",
    "strategies",
    "classpaths",
    "limits",
    "lint",
    "shard",
    "precision",
    "loggers",
    "usage",
    "trainer_checks",
}
ALL = BASE | {"nn", "tasks", "model", "data", "testing", "checkpoint"} | PARTS | ABOVE | TRAINING
ALL |= {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} - {"__init__"}

NEVER: dict[str, set[str]] = {
    **dict.fromkeys(BASE, ALL - BASE),
    "nn": ALL - BASE - {"nn"},
    **dict.fromkeys(PARTS, ALL - BASE - PARTS - {"nn"}),
    "tasks": ALL - BASE - PARTS - {"nn", "tasks"},
    "model": TRAINING | ABOVE | {"data", "testing"},
    "data": ALL - BASE - {"data"},
    **dict.fromkeys(ABOVE, TRAINING | {"testing"}),
    "checkpoint": TRAINING | {"data", "testing"},
    "module": {"cli", "training", "data", "testing"},
    "testing": {"cli", "training"},
}
"""Part -> the parts it must not import, at the top of a file or inside a function."""


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def run_time_nodes(tree):
    """Every node except those below ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from run_time_nodes(other)
            continue
        yield node
        yield from run_time_nodes(node)


def imported(path, tree):
    """Dotted names of what a file imports at run time, constants given to ``import_module`` included."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*start, *((node.module,) if node.module else ())))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def broken_rules(path, tree):
    part = module_of(path)[1] if len(module_of(path)) > 1 else ""
    for name in imported(path, tree):
        root, _, rest = name.partition(".")
        if root == "densectx" and rest.partition(".")[0] in NEVER.get(part, set()):
            yield f"{part} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependency_direction(path):
    assert list(broken_rules(path, ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("data/x.py", "import densectx.model", 1),
        ("data/x.py", "from densectx import model", 1),
        ("data/x.py", "def f():\n    from densectx.tasks.base import Task", 2),
        ("data/x.py", "import importlib\nimportlib.import_module('densectx.nn.norm')", 1),
        ("data/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import densectx.model", 0),
        ("data/x.py", "from ..model import DenseModel", 2),
        ("data/__init__.py", "from ..model import DenseModel", 2),
        ("data/x.py", "from .base import Dataset\nfrom densectx.types import Sample", 0),
        ("nn/x.py", "from densectx.heads.base import Head", 2),
        ("inference/x.py", "import densectx.module", 1),
        ("model.py", "import densectx.tasks.base", 0),
    ],
)
def test_the_rule_itself(file, source, count):
    assert len(list(broken_rules(PACKAGE / file, ast.parse(source)))) == count


CALLS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "os.system",
    "os.popen",
}


def unsafe(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "yaml"):
            yield from (f"from {node.module} import {a.name}" for a in node.names if f"{node.module}.{a.name}" in CALLS)
        if not isinstance(node, ast.Call):
            continue
        loader = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"]
        loader += [ast.unparse(argument) for argument in node.args[1:2]]
        name = ast.unparse(node.func)
        if name in CALLS and not (name.startswith("yaml.load") and loader and loader[0].endswith("SafeLoader")):
            yield name
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in (("weights_only", False), ("shell", True)):
                yield f"{keyword.arg}={value}"


@pytest.mark.fault("A02")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unsafe(path):
    assert list(unsafe(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.fault("A02")
def test_the_unsafe_calls_are_found():
    source = """
import pickle, subprocess, torch, yaml
from pickle import load
torch.load(f, weights_only=False); pickle.load(f); yaml.load(f, Loader=yaml.Loader); eval("1"); exec("1")
subprocess.run("x", shell=True); yaml.load(f, yaml.SafeLoader); model.eval(); yaml.load(f)
"""
    found = [
        "from pickle import load",
        "weights_only=False",
        "pickle.load",
        "yaml.load",
        "eval",
        "exec",
        "shell=True",
        "yaml.load",
    ]
    assert sorted(unsafe(ast.parse(source))) == sorted(found)
