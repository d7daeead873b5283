"""The package as if installed: the tests need no pip."""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes module and entry points visible, unless they are."""
    try:
        distribution("densectx-zoo")
    except PackageNotFoundError:
        project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
        info = tmp_path / "site" / f"densectx_zoo-{project['version']}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = project.get("entry-points", {}).items()
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
        (info / "entry_points.txt").write_text("".join(lines))
        monkeypatch.syspath_prepend(PACKAGE)
        monkeypatch.syspath_prepend(info.parent)
