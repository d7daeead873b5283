"""torchrun starts ranks again after one was killed, and nothing is lost but time."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).resolve().parents[2]


def recover(experiment, name, step, rank, delay):
    """Run the experiment under torchrun; kill a rank some time after a checkpoint; returns what the run ended with."""
    command = ["configs/cluster/torchrun.sh", *experiment.words, "--name", name]
    environment = experiment.environment(PROCESSES=2, PACE=0.05)
    with experiment.start(command, name, env=environment, cwd=ROOT) as agent:
        experiment.wait_for(lambda: step in experiment.checkpoints(name), f"step {step}", name)
        time.sleep(delay)
        os.kill(experiment.workers(agent.pid)[rank], signal.SIGKILL)
        status = agent.wait(150)
    said = experiment.log(name).read_text()
    assert status == 0, said[-4000:]
    # not which rank torchrun names: the survivor may leave, saying whom it waited for, before the agent looks
    assert "--resume auto: going on in" in said, said[-4000:]
    return experiment.end(name)


@pytest.mark.fault("D07")
def test_a_killed_rank_is_started_again(experiment, undisturbed, equal):
    assert equal(recover(experiment, "torchrun", step=8, rank=1, delay=0), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.fault("D07")
def test_twenty_of_twenty_recover(experiment, undisturbed, equal, record_property):
    rng = random.Random(0)
    for trial in range(20):
        found = recover(experiment, f"trial-{trial}", rng.choice((4, 8, 12)), trial % 2, rng.uniform(0, 0.3))
        assert equal(found, undisturbed), trial
    record_property("count", 20)
