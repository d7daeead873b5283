"""The runner of fault rows, run for real on small test files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TESTS = """
import pytest

@pytest.mark.fault("I01")
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_cut(cut):
    pass

@pytest.mark.fault("I02")
def test_flips(record_property):
    record_property("count", 5000)
    record_property("evidence", "5000 flips, 12 kinds of error")

@pytest.mark.fault("I04")
@pytest.mark.fault("I05")
def test_depth():
    assert 1 == 2, "levels lost"

@pytest.mark.fault("I07")
def test_skipped():
    pytest.skip("no such file here")

@pytest.mark.fault("I08")
@pytest.mark.slow
def test_slow():
    pass

def test_of_no_row():
    assert False
"""

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import faults
faults.TESTS, faults.RESULTS = [{tests!r}], Path({results!r})
sys.exit(faults.main({arguments!r}))
"""


@pytest.fixture
def run(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_rows.py").write_text(TESTS)
    results = tmp_path / "faults.json"

    def run(*arguments):
        code = RUN.format(
            benchmarks=str(ROOT / "benchmarks"), tests=str(tests), results=str(results), arguments=list(arguments)
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        rows = json.loads(results.read_text()) if results.exists() else []
        return done, {row["id"]: row for row in rows}

    return run


def test_outcomes_are_those_of_the_tests(run):
    done, rows = run()
    assert done.returncode == 1, done.stderr
    outcomes = {id_: row["outcome"] for id_, row in rows.items() if row["outcome"] != "not run"}
    assert outcomes == {"I01": "passed", "I02": "passed", "I04": "failed", "I05": "failed"}
    assert rows["I07"]["evidence"] == "1 skipped"
    assert rows["I08"]["evidence"] == "no test ran", "slow tests run only when asked for"
    assert rows["I01"]["count"] == 3
    assert rows["I02"]["count"] == 5000
    assert "5000 flips" in rows["I02"]["evidence"]
    assert "test_depth" in rows["I04"]["evidence"]
    assert set(rows["I01"]) == {"id", "class", "outcome", "count", "seconds", "evidence", "command", "commit"}


def test_a_rerun_replaces_its_rows_only(run):
    run()
    _, before = run("I01")
    done, after = run("I08", "--soak")
    assert done.returncode == 0, done.stderr
    assert after["I08"]["outcome"] == "passed"
    assert after["I08"]["command"].endswith("faults.py I08 --soak")
    assert {k: v for k, v in after.items() if k != "I08"} == {k: v for k, v in before.items() if k != "I08"}
    assert list(after) == list(before), "the order of the file"


def test_an_unknown_row_is_refused(run):
    done, rows = run("X99")
    assert done.returncode == 2
    assert "X99" in done.stderr
    assert rows == {}


def test_the_table_counts_rows_without_a_result(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from faults import table

    sections = {"T01": "training", "T02": "training", "T03": "training", "T04": "training", "S01": "storage"}
    rows = {id_: {"class": "E", "fault": "x", "section": section} for id_, section in sections.items()}
    outcomes = {"T01": "passed", "T02": "failed", "T03": "not run"}  # T04 and S01 have no test
    results = [{"id": id_, "outcome": outcome, "count": 7} for id_, outcome in outcomes.items()]
    assert table(results, rows)[2:] == [
        "| training | 1 of 4 | 7 | T02 failed, T03 not run, T04 not run |",
        "| storage | 0 of 1 | 0 | S01 not run |",
    ]
