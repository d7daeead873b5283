"""The package as if installed: the tests need no pip. Nothing here has to be renamed."""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """Makes package and entry points visible, unless they are."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    try:
        distribution(project["name"])
    except PackageNotFoundError:
        info = tmp_path / "site" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        groups = project["entry-points"].items()
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
        (info / "entry_points.txt").write_text("".join(lines))
        monkeypatch.syspath_prepend(PACKAGE)
        monkeypatch.syspath_prepend(info.parent)
