"""A real Slurm of two nodes on this machine runs, preempts, requeues and resumes the job script of the project."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "configs" / "cluster" / "slurm.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd")

CONF = """
ClusterName=densectx
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
JobRequeue=1
KillWait=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The cluster's commands, each with a time limit."""

    def __init__(self, folder, experiment, environment):
        self.folder, self.experiment, self.environment = folder, experiment, environment

    def __call__(self, *command, check=True):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def submit(self, name, *words, minutes=10, **variables):
        """A job of the project's script on both nodes; returns its number."""
        command = [
            "sbatch",
            "--parsable",
            f"--job-name={name}",
            "--nodes=2",
            "--ntasks-per-node=1",
            f"--time={minutes}",
        ]
        command += [f"--chdir={self.folder}", f"--output={self.experiment.log(name)}"]
        command += ["--export=" + ",".join(["ALL", *(f"{key}={value}" for key, value in variables.items())])]
        return self(*command, str(SCRIPT), *words)

    def shown(self, job):
        """``{JobState: RUNNING, Restarts: 0, ...}``."""
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", job)))

    def wait(self, job, name, *states, seconds=120.0):
        """Until a job is in one of the states; what is shown of it then."""
        self.experiment.wait_for(lambda: self.shown(job)["JobState"] in states, " or ".join(states), name, seconds)
        return self.shown(job)

    def restart(self, job, name, seconds=120.0):
        """Wait until a job is requeued, and start it soon; Slurm itself would wait for two minutes.

        Not within the second in which its credentials were revoked.
        """
        ready = {"JobState": "PENDING", "Reason": "BeginTime"}
        self.experiment.wait_for(lambda: self.shown(job).items() >= ready.items(), "requeued job", name, seconds)
        self("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def said(self, name):
        """What a job has said so far."""
        log = self.experiment.log(name)
        return log.read_text() if log.exists() else ""

    def logs(self):
        """The ends of what the daemons said."""
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in self.folder.glob("*.log"))


@pytest.fixture(scope="module")
def slurm(experiment, tmp_path_factory):
    """Two nodes, one core each; nothing outside its folder is touched, and nothing runs on afterwards."""
    if os.geteuid() != 0:
        pytest.skip("needs root: Slurm's daemons start jobs as their users")
    if missing := [daemon for daemon in DAEMONS if shutil.which(daemon) is None]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    host = socket.gethostname().partition(".")[0]
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text(CONF.format(folder=folder, host=host, ports=ports))
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for name in ("state", "spool.n0", "spool.n1"):
        (folder / name).mkdir()
    # else the first node's name, which only a real cluster can look up, and a port that follows from the job's number
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[3]}
    environment = experiment.environment(SLURM_CONF=conf, RUNS=experiment.runs, PACE=0.05, **meeting)
    found = Slurm(folder, experiment, environment)
    own = [f"--{kind}={folder}/munge.{end}" for kind, end in (("socket", "socket"), ("key-file", "key"))]
    own += [f"--{kind}-file={folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
    try:
        found("munged", "--force", *own)  # forced: the folder belongs to root, as the key does
        found("slurmctld", "-f", str(conf))
        for node in ("n0", "n1"):
            found("slurmd", "-f", str(conf), "-N", node)
        idle = ("sinfo", "--noheader", "--states", "idle", "--format", "%D")
        experiment.wait_for(lambda: found(*idle) == "2", "idle nodes", "slurm", 30)
        yield found
    finally:
        found("scancel", "--state=RUNNING", "--signal=KILL", "--full", "--user=root", check=False)
        for file in (*folder.glob("slurm*.pid"), folder / "munge.pid"):
            if file.exists():
                os.kill(int(file.read_text()), signal.SIGKILL)


def test_a_preempted_job_is_requeued_and_goes_on(slurm, experiment, undisturbed, equal):
    name = "slurm-job"
    go = experiment.folder / "go"
    words = [word for word in experiment.words if word != "--no-report"]
    job = slurm.submit(name, *words, HOLD_FOR=go)
    experiment.wait_for(lambda: 12 in experiment.checkpoints(name), "step 12", name)
    slurm("scancel", "--signal=TERM", job)  # to the tasks, as --signal=TERM@60 does before the time is up
    go.touch()
    slurm.restart(job, name)
    assert "densectx: preempted, requeued" in slurm.said(name)
    ended = slurm.wait(job, name, "COMPLETED", "FAILED")
    said = slurm.said(name)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), (
        said[-4000:] + slurm.logs()
    )
    assert re.search(r"densectx: .* at step \d+: saved", said)
    assert "--resume auto: going on in" in said
    assert not list((experiment.runs / name).glob("*/preempted"))
    assert (experiment.runs / name / "0" / "report.html").is_file(), "written by the script, when all ranks have ended"
    assert equal(experiment.end(name), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_time_limit_is_a_preemption(slurm, experiment, undisturbed, equal):
    """``--signal=TERM@60`` of the job script; Slurm may send it another minute earlier."""
    name = "limit"
    job = slurm.submit(name, *experiment.words, minutes=2, PACE=4)
    while slurm.wait(job, name, "PENDING", "COMPLETED", "FAILED", "TIMEOUT", seconds=200)["JobState"] == "PENDING":
        slurm.restart(job, name)
        slurm.wait(job, name, "RUNNING")
    ended = slurm.shown(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), slurm.said(name)[-4000:] + slurm.logs()
    assert int(ended["Restarts"]) >= 1
    assert equal(experiment.end(name), undisturbed)


@pytest.fixture
def program(slurm, monkeypatch):
    """Puts a shell script in the place of the command ``densectx``: what the job script makes of its end is looked at."""
    path = slurm.environment["PATH"]

    def program(text):
        folder = slurm.folder / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "densectx").write_text(f"#!/bin/bash\n{text}\n")
        (folder / "densectx").chmod(0o755)
        slurm.environment["PATH"] = f"{folder}:{path}"

    yield program
    slurm.environment["PATH"] = path


def test_other_ends_end_the_job(slurm, program):
    program("exit $((7 * SLURM_PROCID))")  # one rank failed
    job = slurm.submit("fails")
    assert slurm.wait(job, "fails", "FAILED", seconds=30)["ExitCode"] == "7:0"
    assert slurm.shown(job)["Restarts"] == "0"


def test_a_mark_in_the_run_folder_counts_as_preempted(slurm, program, experiment):
    (experiment.runs / "marked" / "0").mkdir(parents=True)
    program(f"touch {experiment.runs}/marked/0/preempted")
    job = slurm.submit("marked")
    experiment.wait_for(lambda: "requeued" in slurm.said("marked"), "requeueing", "marked", 30)
    program("exit 0")  # and leaves the mark
    slurm.restart(job, "marked", 30)
    assert slurm.wait(job, "marked", "COMPLETED", seconds=30)["Restarts"] == "1", "an old mark counts no more"


def test_a_cancelled_job_does_not_come_back(slurm, program, experiment):
    program("trap 'exit 143' TERM; echo ready; sleep 60 & wait")
    job = slurm.submit("cancelled")
    experiment.wait_for(lambda: slurm.said("cancelled").count("ready") == 2, "two ranks", "cancelled", 30)
    slurm("scancel", job)
    ended = slurm.wait(job, "cancelled", "CANCELLED", "PENDING", seconds=30)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), slurm.said("cancelled")
