"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# before torch is imported, here and in the processes that tests start: threads of several small processes on few cores
# spin against each other, which is many times slower than one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")

MODULE = '''
class Task:
    """A task of a plugin."""

    def __init__(self, features, weight: float = 1.0, mode="a"):
        self.given = (features, weight, mode)
'''


@pytest.fixture
def distribute(tmp_path, monkeypatch):
    """Put a fake distribution on ``sys.path``: a ``.dist-info`` folder and a module, as pip would leave them.

    Args of the function: the name (its module has the same with underscores), kind -> {name: attribute of the module
    or "module:attribute"}, source of the module (None for none), version, ``Requires-Dist`` lines.
    Returns its folder.
    """
    modules = set(sys.modules)

    def distribute(name, entries, module=MODULE, *, version="1.0", requires=()):
        package = name.replace("-", "_")
        folder = tmp_path / f"site-{name}"
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
        points = []
        for kind, names in entries.items():
            points.append(f"[densectx.{kind}]")
            points += [f"{key} = {value if ':' in value else f'{package}:{value}'}" for key, value in names.items()]
        (info / "entry_points.txt").write_text("\n".join(points) + "\n")
        if module is not None:
            (folder / f"{package}.py").write_text(module)
        monkeypatch.syspath_prepend(folder)
        return folder

    yield distribute
    for name in set(sys.modules) - modules:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def data_root():
    """Folder of the research data that some tests measure on."""
    folder = os.environ.get("DENSECTX_DATA")
    if not folder:
        pytest.skip("needs real data: set DENSECTX_DATA to its folder")
    return Path(folder)
