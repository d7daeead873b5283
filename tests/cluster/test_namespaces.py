"""Two machines as two network namespaces on this one: ranks that share nothing but a file system and a cable."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).resolve().parents[2]
PORT = 29500  # of a network that nobody else is in
TIMEOUT = 5.0  # seconds that a rank waits for the other


class Network:
    """Nodes 0 and 1, with a cable between them."""

    def __init__(self):
        self.names = [f"densectx{os.getpid()}{end}" for end in "ab"]
        self.links = [f"dx{os.getpid()}{end}" for end in "ab"]  # at most 15 letters
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def ip(self, *words):
        """The command ``ip``."""
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)

    def open(self):
        """Make both, and connect them."""
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            self.ip("link", "set", link, "netns", name)
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for device in ("lo", link):
                self.ip("-n", name, "link", "set", device, "up")

    def cut(self):
        """The cable of node 0 is pulled out."""
        self.ip("-n", self.names[0], "link", "set", self.links[0], "down")

    def close(self):
        """Both are gone, and what was in them."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10)

    def on(self, node, *command):
        """A command as it runs on a node."""
        return ["ip", "netns", "exec", self.names[node], *command]

    def variables(self, node):
        """What tells a process where the others are."""
        return {"GLOO_SOCKET_IFNAME": self.links[node], "MASTER_ADDR": self.addresses[0], "MASTER_PORT": PORT}


@pytest.fixture
def network():
    """Two connected nodes."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip: apt-get install iproute2")
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes network namespaces")
    found = Network()
    try:
        try:
            found.open()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        yield found
    finally:
        found.close()


def run_both(experiment, network, name, command, variables):
    """A command on both nodes to its end; what they said."""
    with ExitStack() as stack:
        processes = []
        for node in (0, 1):
            environment = experiment.environment(**network.variables(node), **variables(node))
            on = network.on(node, *command)
            processes.append(stack.enter_context(experiment.start(on, f"{name}-{node}", env=environment, cwd=ROOT)))
        statuses = [process.wait(150) for process in processes]
    said = [experiment.log(f"{name}-{node}").read_text() for node in (0, 1)]
    assert statuses == [0, 0], "\n".join(text[-3000:] for text in said)
    return said


def test_torchrun_on_two_nodes_trains_like_one_process(experiment, network, undisturbed, single, equal):
    command = ["configs/cluster/torchrun.sh", *experiment.words, "--name", "nodes"]
    run_both(experiment, network, "nodes", command, lambda node: {"NODES": 2, "NODE": node})
    found = experiment.end("nodes")
    assert equal(found, undisturbed), "as two processes of one machine"
    for key, value in single["state_dict"].items():
        error = (found["state_dict"][key] - value).abs().max()
        assert error < 1e-5, (key, error)


def test_doctor_meets_the_other_node(experiment, network):
    command = [sys.executable, "-m", "densectx", "doctor", "--ddp", "--json"]
    said = run_both(experiment, network, "doctor", command, lambda node: {"WORLD_SIZE": 2, "RANK": node})
    answer = json.loads(said[0].splitlines()[-1])
    (group,) = [found for found in answer["findings"] if found["subject"] == "process group"]
    assert group["text"].startswith("2 ranks"), answer
    assert group["level"] == "ok"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_rank_of_the_second_node_is_started_again(experiment, network, undisturbed, equal, record_property):
    """The agents of both nodes restart their workers together."""
    for trial in range(3):
        name = f"node-killed-{trial}"
        command = ["configs/cluster/torchrun.sh", *experiment.words, "--name", name]
        with ExitStack() as stack:
            agents = []
            for node in (0, 1):
                variables = {"NODES": 2, "NODE": node, "PACE": 0.1}
                environment = experiment.environment(**network.variables(node), **variables)
                on = network.on(node, *command)
                agents.append(stack.enter_context(experiment.start(on, f"{name}-{node}", env=environment, cwd=ROOT)))
            experiment.wait_for(lambda name=name: 8 in experiment.checkpoints(name), "step 8", f"{name}-0")
            (killed,) = experiment.workers(agents[1].pid).values()
            os.kill(killed, signal.SIGKILL)
            statuses = [agent.wait(200) for agent in agents]
        said = [experiment.log(f"{name}-{node}").read_text() for node in (0, 1)]
        assert statuses == [0, 0], "\n".join(text[-3000:] for text in said)
        assert "exitcode: -9" in said[1]
        assert equal(experiment.end(name), undisturbed)
    record_property("count", 3)


@pytest.mark.fault("D04")
def test_a_cut_network_ends_both_ranks(experiment, network, record_property):
    name = "cut"
    command = [sys.executable, "-m", "densectx", "fit", *experiment.words, "--name", name]
    command += ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
    with ExitStack() as stack:
        processes = []
        for node in (0, 1):
            variables = {"NODE_RANK": node, "LOCAL_RANK": 0, "DENSECTX_TIMEOUT": TIMEOUT, "PACE": 0.2}
            environment = experiment.environment(**network.variables(node), **variables)
            on = network.on(node, *command)
            processes.append(stack.enter_context(experiment.start(on, f"{name}-{node}", env=environment)))
        experiment.wait_for(lambda: 4 in experiment.checkpoints(name), "step 4", f"{name}-0")
        network.cut()
        since = time.monotonic()
        statuses = [process.wait(60) for process in processes]
        seconds = time.monotonic() - since
    said = [experiment.log(f"{name}-{node}").read_text() for node in (0, 1)]
    assert statuses == [7, 7], "\n".join(text[-3000:] for text in said)
    assert seconds <= TIMEOUT + 5, seconds
    for rank, text in enumerate(said):
        assert f"densectx: error: rank {rank} of 2" in text
        assert "waited in" in text
        assert "--resume" in text
    record_property("evidence", f"both ended {seconds:.1f} s after the cut, with a timeout of {TIMEOUT:g} s")
