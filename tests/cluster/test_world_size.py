"""A run goes on with another number of ranks and the same global batch: the same samples, losses equal in rounding."""

from __future__ import annotations

import csv
import shutil

import pytest

pytestmark = pytest.mark.xdist_group("processes")

AT, ALLOWED = 12, ("data.sources.mosaic.batch_size", "trainer.devices", "trainer.strategy")


def losses(experiment, name):
    """{step: {loss: value}} of a run's log."""
    (folder,) = (experiment.runs / name).iterdir()
    with (folder / "metrics.csv").open() as file:
        return {
            int(row["step"]): {k: float(v) for k, v in row.items() if k.startswith("train/") and v}
            for row in csv.DictReader(file)
        }


def stopped(experiment, name, copy):
    """A copy of a run as it was at step AT, its log left out; the words that go on with it on other ranks."""
    folder = experiment.runs / copy / "0"
    shutil.copytree(experiment.runs / name / "0", folder, symlinks=True)
    (folder / "metrics.csv").unlink()
    for file in (folder / "checkpoints").iterdir():
        if file.is_symlink() or int(file.stem.partition("-")[2]) > AT:
            file.unlink()
    return ["--resume", str(folder), *(word for key in ALLOWED for word in ("--allow-changed", key))]


@pytest.mark.fault("T04")
@pytest.mark.usefixtures("undisturbed", "single")
def test_one_rank_becomes_two_and_two_become_one(experiment, alone, fit, capsys, caplog, record_property):
    said = {"two": fit(2, "becomes-two", *stopped(experiment, "single", "becomes-two"))}
    with caplog.at_level("INFO"):
        alone("becomes-one", *stopped(experiment, "undisturbed", "becomes-one"))
    said["one"] = caplog.text + capsys.readouterr().err
    assert "Saved by 1 rank, goes on with 2: the same samples in the same order" in said["two"]
    assert "Saved by 2 ranks, goes on with 1: the same samples in the same order" in said["one"]
    largest = 0.0
    for name, whole in (("becomes-two", "single"), ("becomes-one", "undisturbed")):
        found, expected = losses(experiment, name), losses(experiment, whole)
        steps = [step for step in expected if step >= AT and expected[step]]
        assert len(steps) >= 10
        for step in steps:
            assert found[step].keys() == expected[step].keys()
            largest = max(largest, *(abs(found[step][key] - expected[step][key]) for key in expected[step]))
    assert largest <= 1e-5
    record_property("evidence", f"largest difference of a loss {largest:.1e}")


@pytest.mark.usefixtures("undisturbed")
def test_ranks_that_do_not_see_the_same_run_are_refused(experiment, fit):
    """A shared file system may show a new file late: then a rank would start afresh beside one that goes on."""
    stopped(experiment, "undisturbed", "unseen")
    late = "import densectx.training\nif number == 1: densectx.training.newest_run = lambda *given: None"
    said = fit(2, "unseen", "--resume", "auto", first=late, expected=[7, 7])
    assert "rank 1 goes on from step 0, rank 0 from step 12" in said
