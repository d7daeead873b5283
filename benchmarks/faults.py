"""Inject faults and keep how each ended: ``benchmarks/results/faults.json``.

    python benchmarks/faults.py [ID ...] [--soak]
    python benchmarks/faults.py --readme

A row of ``faults.yaml`` is proven by the tests marked ``@pytest.mark.fault("ID")``. Rows that are run replace their
earlier outcomes, others stay; a row whose tests were all skipped, or that has none, is "not run", never "passed".
Rows run on a checkout with changes say so in their commit. The second form rewrites the table of README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import pytest
import yaml
from record import replace_marked

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).with_name("faults.yaml")
RESULTS = Path(__file__).parent / "results" / "faults.json"
TESTS = ("tests", "plugins")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a row failed."""
    rows = known()
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("ids", nargs="*", metavar="ID", help="rows to run, default all")
    parser.add_argument("--soak", action="store_true", help="tests of minutes and hours as well")
    parser.add_argument("--readme", action="store_true", help="only rewrite the README's table")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.ids) - set(rows)):
        parser.error(f"no such row: {', '.join(unknown)} (rows: {', '.join(rows)})")
    if given.readme:
        write_readme(rows)
        return 0
    wanted = given.ids or list(rows)
    recorder = Recorder(set(wanted), soak=given.soak)
    # rows are chosen by the recorder, not by the marker expression of pyproject.toml
    pytest.main(["-q", "-m", "", "--rootdir", str(ROOT), *(str(ROOT / folder) for folder in TESTS)], [recorder])
    command = shlex.join(["python", "benchmarks/faults.py", *given.ids, *(["--soak"] if given.soak else [])])
    fresh = {id_: recorder.row(id_, rows[id_]["class"], command, commit()) for id_ in wanted}
    save(fresh)
    for row in fresh.values():
        sys.stdout.write(f"{row['id']} {row['class']:4} {row['outcome']:8} {row['count']:7} {row['seconds']:8.1f} s\n")
    return int(any(row["outcome"] == "failed" for row in fresh.values()))


def known() -> dict[str, dict[str, str]]:
    """{id: {class, fault, section}} in the order of the file."""
    sections = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    return {id_: {**row, "section": name} for name, rows in sections.items() for id_, row in rows.items()}


@dataclass
class _Found:
    """What the tests of a row did."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    count: int = 0
    seconds: float = 0.0
    evidence: list[str] = field(default_factory=list)


@final
class Recorder:
    """A pytest plug-in: runs only the tests of some rows and keeps their outcomes.

    A test that injects many faults says so by ``record_property("count", n)``, what it measured by
    ``record_property("evidence", text)``; a test without is one fault.
    """

    def __init__(self, wanted: set[str], *, soak: bool) -> None:
        self.wanted, self.soak = wanted, soak
        self.found: dict[str, _Found] = defaultdict(_Found)
        self._ids: dict[str, set[str]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests of the wanted rows."""
        for item in items:
            ids = {id_ for mark in item.iter_markers("fault") for id_ in mark.args[:1]} & self.wanted
            if ids and (self.soak or item.get_closest_marker("slow") is None):
                self._ids[item.nodeid] = ids
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self._ids])
        items[:] = [item for item in items if item.nodeid in self._ids]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count set-up, call and tear-down of a test in its rows."""
        properties = defaultdict(list)
        for name, value in report.user_properties:
            properties[name].append(value)
        for id_ in self._ids[report.nodeid]:
            found = self.found[id_]
            found.seconds += report.duration
            if report.failed:
                found.failed.append(report.nodeid)
                found.evidence.append(f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}")
            elif report.skipped:
                found.skipped.append(report.nodeid)
            elif report.when == "call":
                found.passed.append(report.nodeid)
                found.count += sum(map(int, properties["count"])) or 1
                found.evidence += [str(text) for text in properties["evidence"]]

    def row(self, id_: str, class_: str, command: str, commit: str) -> dict[str, Any]:
        """The outcome of a row as it is kept."""
        found = self.found[id_]
        outcome = "failed" if found.failed else "passed" if found.passed else "not run"
        tests = sorted({name.partition("[")[0] for name in (*found.passed, *found.failed)})
        if found.skipped:
            tests.append(f"{len(found.skipped)} skipped")
        return {
            "id": id_,
            "class": class_,
            "outcome": outcome,
            "count": found.count,
            "seconds": round(found.seconds, 2),
            "evidence": "; ".join([*found.evidence, *tests]) or "no test ran",
            "command": command,
            "commit": commit,
        }


def save(fresh: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the rows that were run, at once or not at all."""
    order = list(known())
    rows = {row["id"]: row for row in load()} | dict(fresh)
    text = json.dumps([rows[id_] for id_ in sorted(rows, key=order.index)], indent=1) + "\n"
    RESULTS.parent.mkdir(exist_ok=True)
    beside = RESULTS.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, RESULTS)


def load() -> list[dict[str, Any]]:
    """The rows that were kept."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def commit() -> str:
    """Of the checkout, with ``+changes`` where it is not what was committed."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + (
        "+changes" if git("status", "--porcelain", "densectx", "tests", "plugins") else ""
    )


def write_readme(rows: Mapping[str, Mapping[str, str]]) -> None:
    """Replace the text between the README's markers by the outcomes, a line a section."""
    replace_marked("faults", table(load(), rows))


def table(results: Iterable[Mapping[str, Any]], rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Markdown: kinds of faults with what passed, how many cases they tried, and what failed or was not run.

    Every row of ``rows`` counts; one without a result, since no test proves it, was not run.
    """
    by_id = {row["id"]: row for row in results}
    lines = ["| faults | rows passed | cases | not passed |", "|---|---|---|---|"]
    for section in dict.fromkeys(row["section"] for row in rows.values()):
        ids = [id_ for id_, row in rows.items() if row["section"] == section]
        found = [by_id.get(id_, {"id": id_, "outcome": "not run"}) for id_ in ids]
        good = [row for row in found if row["outcome"] == "passed"]
        other = [f"{row['id']} {row['outcome']}" for row in found if row["outcome"] != "passed"]
        cases = sum(row["count"] for row in good)
        lines.append(f"| {section} | {len(good)} of {len(found)} | {cases} | {', '.join(other) or '-'} |")
    return lines


if __name__ == "__main__":
    start = time.perf_counter()
    status = main()
    sys.stdout.write(f"{time.perf_counter() - start:.0f} s\n")
    sys.exit(status)
