"""The benchmark of speed: cheap sections for real, and whether its ratios are those of the times in its file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def parts(monkeypatch):
    """The modules of the benchmark by name, as its script finds them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return SimpleNamespace(
        **{name: importlib.import_module(f"speed.{name}") for name in ("growth", "networks", "tables", "timing")}
    )


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_script", BENCHMARKS / "speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("parts")
def test_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # and put back what the script sets
    main = script().main
    arguments = ["--quick", "--dtypes", "fp32", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    assert main(["restoration", *arguments]) == 0
    assert main(["startup", *arguments]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert list(found["sections"]) == ["restoration", "startup"]
    for section in found["sections"].values():
        assert section["quick"]
        assert section["threads"] == torch.get_num_threads()
        assert len(section["commit"].partition("+")[0]) == 40
        for row in [*section.get("comparisons", []), *section.get("measured", [])]:
            for arm in row["arms"].values():
                assert len(arm["times_s"]) == 2
                assert arm["median_s"] == statistics.median(arm["times_s"]) > 0

    rows = found["sections"]["restoration"]["comparisons"]
    text = (tmp_path / "speed.md").read_text()
    drawn = "".join(ET.fromstring((tmp_path / "speed.svg").read_text()).itertext())
    assert [list(row["ratios"]) for row in rows] == [["DnCNN-S"], ["VDSR"]]
    for row in rows:
        (_, ours), (peer, theirs) = row["arms"].items()
        time, macs = (ours[key] / theirs[key] for key in ("median_s", "macs"))
        assert row["ratios"][peer] == pytest.approx({"time": time, "macs": macs, "time_by_macs": time / macs})
        assert f"| {peer} | {1e3 * ours['median_s']:.4g} | {1e3 * theirs['median_s']:.4g} | **{time:.2f}** |" in text
        assert f"{row['what']}: {peer}{time:.2f}" in drawn
        assert theirs["s_per_megapixel"] == pytest.approx(theirs["median_s"] / row["megapixels"])
    assert "figures mean nothing" in text
    assert "Not run." in text

    before = (tmp_path / "speed.json").read_bytes()
    capsys.readouterr()
    assert main(["startup", *arguments]) == 0
    assert "already" in capsys.readouterr().err
    assert (tmp_path / "speed.json").read_bytes() == before


def test_unknown_section(parts, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        script().main(["sped", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no section sped; there are segmentation" in capsys.readouterr().err


def test_arms_take_turns(parts):
    said = []
    plan = parts.timing.Plan(True, 4, 0.0, 1, ("fp32",), {})
    arms = [parts.timing.Arm(name, lambda name=name: said.append(name), {"macs": 2}) for name in "abc"]
    found = parts.timing.measure(arms, plan)
    # one round to warm up, then forwards and backwards; the budget is used up, but there are three rounds at least
    assert "".join(said) == "abc" + "abc" + "cba" + "abc"
    assert [len(arm["times_s"]) for arm in found.values()] == [3, 3, 3]


def test_every_block_of_the_fit_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    overhead = importlib.import_module("overhead")
    found = overhead.compared([*overhead.ARMS["segmentation"], "data.sources.mosaic.batch_size=1"], 1, 2)
    assert len(found["ratio_by_block"]) == 2


def test_peers_are_those_published(parts):
    """DnCNN-S: 555 K parameters; VDSR: 666 K (the figures of their papers and of KAIR's table)."""
    dncnn, vdsr = parts.networks.dncnn(1), parts.networks.vdsr(1, 2)
    assert parts.networks.parameters(dncnn.module) == 555_137
    assert parts.networks.parameters(vdsr.module) == 665_921
    x = torch.rand(1, 1, 8, 8)
    # each weight is used once a pixel; biases and the bicubic enlargement are no multiply-adds of a convolution
    assert dncnn.facts(x)["macs"] == (555_137 - 16 * 64 - 1) * 64
    assert vdsr.run(vdsr.module, x).shape == (1, 1, 16, 16)


def test_training_counts_the_backward(parts):
    net = parts.networks.Network("one", torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Conv2d(3, 4, 1)))
    forward = (2 * 3 + 3 * 4) * 25
    x = torch.rand(1, 2, 5, 5)
    assert net.facts(x)["macs"] == forward
    # gradients of both weights and of what lies between, not of the input
    assert net.facts(x, training=True)["macs"] == forward + forward + 3 * 4 * 25


def test_lines(parts):
    xs = [1, 2, 4, 8]
    arms = {str(x): {"median_s": 3.0 + 0.5 * x} for x in xs}
    curve = parts.growth.curve("w", "tasks", xs, arms)
    assert (curve["offset_s"], curve["slope_s"]) == pytest.approx((3.0, 0.5))
    assert curve["worst"] == pytest.approx(0.0, abs=1e-9)
    assert parts.growth.exponent(xs, [7 * x**1.5 for x in xs]) == pytest.approx(1.5)
