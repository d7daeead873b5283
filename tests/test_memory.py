"""How much memory there is: control groups of both versions, as folders made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from densectx import memory
from densectx.memory import free_memory, rooms

NONE = 9223372036854771712
"""What version 1 has for no limit: the largest number of whole pages."""


@pytest.fixture
def groups(tmp_path):
    """Function that writes a group's files below a root, and gives the process's list of groups."""

    def group(below, *, version, limit, used, inactive):
        folder = tmp_path / below
        folder.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        total = f"total_inactive_file {inactive}\n" if version == 1 else ""
        own = inactive if version == 2 else 1  # without the groups below
        (folder / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {own}\n{total}slab 9\n")

    return group


def own(tmp_path, text):
    file = tmp_path / "own"
    file.write_text(text)
    return file


def test_cached_files_count_as_free(groups, tmp_path):
    groups("a", version=2, limit=1000, used=990, inactive=900)
    assert rooms(own(tmp_path, "0::/a\n"), tmp_path) == [910]


def test_the_groups_above_count_too(groups, tmp_path):
    (tmp_path / "cgroup.procs").touch()  # the top has no limit
    groups("a", version=2, limit=500, used=450, inactive=20)
    groups("a/b", version=2, limit="max", used=400, inactive=0)
    groups("a/b/c", version=2, limit=300, used=100, inactive=0)
    groups("a/other", version=2, limit=1, used=1, inactive=0)
    assert sorted(rooms(own(tmp_path, "0::/a/b/c\n"), tmp_path)) == [70, 200]


def test_a_container_whose_group_is_the_top(groups, tmp_path):
    groups(".", version=2, limit=1000, used=600, inactive=50)
    for path in ("/", "/docker/0123", "/../elsewhere"):
        assert rooms(own(tmp_path, f"0::{path}\n"), tmp_path) == [450]


def test_version_1(groups, tmp_path):
    groups("memory", version=1, limit=NONE, used=10**9, inactive=0)
    groups("memory/a:b", version=1, limit=1000, used=800, inactive=300)
    file = own(tmp_path, "5:cpu,cpuacct:/other\n4:memory:/a:b\n0::/\n")
    small, large = sorted(rooms(file, tmp_path))
    assert small == 500
    assert large > 2**60, "no limit"


def test_what_cannot_be_read_is_no_limit(groups, tmp_path):
    assert rooms(tmp_path / "none", tmp_path) == []
    assert rooms(own(tmp_path, "0::/gone\n"), tmp_path) == []
    groups("a", version=2, limit=1000, used=600, inactive=0)
    (tmp_path / "a/memory.stat").unlink()
    assert rooms(own(tmp_path, "0::/a\n"), tmp_path) == [400]


def test_the_smallest_counts(groups, tmp_path, monkeypatch):
    groups("a", version=2, limit=1000, used=990, inactive=900)
    monkeypatch.setattr(memory, "OWN", own(tmp_path, "0::/a\n"))
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    assert free_memory() == 910
    groups("a", version=2, limit=1000, used=1100, inactive=0)
    assert free_memory() == 0
    groups("a", version=2, limit="max", used=1100, inactive=0)
    assert free_memory() > 10**6


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="a Linux system")
def test_this_machine_has_some():
    assert free_memory() > 10**6
