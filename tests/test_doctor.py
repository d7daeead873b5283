"""``densectx doctor``: what it finds on this machine, in variables, and in real process groups."""

import json
import os
import resource
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from densectx.cli import main
from densectx.doctor.cluster import cluster
from densectx.doctor.findings import worst
from densectx.doctor.group import Place, joined
from densectx.doctor.machine import disk, files, packages, shared_memory, threads
from densectx.errors import DistributedError


def problems(environment):
    return {found.subject for found in cluster(environment) if found.level == "problem"}


def test_this_machine_can_train(tmp_path, capsys):
    assert main(["doctor", "--folder", str(tmp_path / "runs"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    subjects = {found["subject"] for found in answer["findings"]}
    assert answer["format"] == 1
    assert {"packages", "processor", "threads", "memory", "run folder", "launcher"} <= subjects
    assert not (tmp_path / "runs").exists(), "looking leaves nothing behind"


def test_a_folder_that_cannot_be_written_is_a_problem_of_storage(capsys):
    assert main(["doctor", "--folder", "/proc/runs"]) == 8
    assert "trainer.default_root_dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, set()),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}, set()),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1"}, {"RANK"}),
        ({"WORLD_SIZE": "two"}, {"WORLD_SIZE"}),
        ({"WORLD_SIZE": "2", "RANK": "0"}, {"MASTER_ADDR"}),
        ({"MASTER_ADDR": "no-such-host.invalid"}, {"MASTER_ADDR"}),
        ({"GLOO_SOCKET_IFNAME": "eth99"}, {"GLOO_SOCKET_IFNAME"}),
        ({"GLOO_SOCKET_IFNAME": "lo"}, set()),
        ({"SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "2"}, {"SLURM_NTASKS"}),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "2"}, set()),
        ({"SLURM_NTASKS": "2x", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "2"}, {"SLURM_NTASKS"}),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "b"}, {"SLURM_JOB_NUM_NODES"}),
        ({"LOCAL_WORLD_SIZE": "abc"}, {"LOCAL_WORLD_SIZE"}),
    ],
)
def test_variables_that_contradict_each_other(environment, expected):
    assert problems(environment) == expected


def test_a_number_of_processes_that_is_none_counts_as_one(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "abc")
    assert "for each of 1 process on" in threads().text


def test_a_folder_out_of_reach_is_a_problem_of_storage(tmp_path):
    found = disk(tmp_path / ("x" * 300))  # not looked up, as below a folder that may not be entered
    assert (found.level, found.status) == ("problem", 8)
    assert found.text.endswith("xxx: cannot be written: File name too long")


def test_a_source_tree_without_metadata_is_a_warning(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("densectx.doctor.machine.requires", requires)
    assert packages().level == "warning"


def test_every_problem_has_a_fix_and_a_status():
    found = list(cluster({"WORLD_SIZE": "2", "RANK": "5", "GLOO_SOCKET_IFNAME": "eth99"}))
    assert worst(found) == 7
    assert all(finding.fix and finding.status for finding in found if finding.level == "problem")


def test_secrets_of_the_environment_are_not_printed():
    text = " ".join(found.text for found in cluster({"RANK": "0", "AWS_SECRET_ACCESS_KEY": "hunter2"}))
    assert "RANK=0" in text
    assert "hunter2" not in text


def test_little_space_is_a_warning(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(total=2**26, free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert disk(tmp_path).level == "warning"
    assert [found.level for found in shared_memory(tmp_path)] == ["warning"]


@pytest.mark.parametrize(
    ("limits", "level"), [((1024, 1 << 20), "ok"), ((1024, 2048), "warning"), ((1024, resource.RLIM_INFINITY), "ok")]
)
def test_few_open_files_are_a_warning(monkeypatch, limits, level):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    assert files().level == level


def test_two_processes_of_this_machine_meet(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "difflib.py").write_text("raise SystemExit('ran what lay in the working directory')")
    assert main(["doctor", "--ddp", "--json"]) == 0
    texts = {found["subject"]: found["text"] for found in json.loads(capsys.readouterr().out)["findings"]}
    assert texts["process group"].startswith("2 ranks on 1 machine met")
    assert "all-reduce right" in texts["gloo"]


def test_a_rank_that_does_not_come_is_named(free_port):
    port = free_port()
    with pytest.raises(DistributedError, match=rf"ranks 1, 2 did not come to 127\.0\.0\.1:{port} within 2 s"):
        joined(Place(0, 3, "127.0.0.1", port, served=False), 2.0)


def test_an_address_where_nobody_answers_is_named(free_port):
    port = free_port()
    with pytest.raises(DistributedError, match=rf"rank 1: no meeting at 127\.0\.0\.1:{port}.*MASTER_ADDR"):
        joined(Place(1, 2, "127.0.0.1", port, served=False), 1.0)


def test_a_port_that_is_taken_is_named():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(DistributedError, match=f"{taken.getsockname()[1]}.*MASTER_PORT"),
    ):
        joined(Place(0, 2, "127.0.0.1", taken.getsockname()[1], served=False), 1.0)


def test_under_torchrun_it_tests_the_group_of_that_job():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, "-m", "densectx", "doctor", "--ddp"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks on 1 machine met") == 1, "one answer for the job"
    assert "torchrun, rank 0 of 2" in done.stdout
