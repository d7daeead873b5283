"""Forks runs that have imported everything: a fault test starts a hundred in the time that a few imports take.

The argument is a config, which is built once, since building the first one takes longer than the others. Nothing is
differentiated here: torch's engine cannot be forked once it has run.

Reads JSON lines: ``{"start": argv, "environment": {...}, "folder": ..., "log": ...}`` is answered by the number of a
new process that runs ``densectx`` with these arguments, ``{"wait": pid, "seconds": s}`` by its exit status (negative:
the signal that ended it), or null if it still runs then.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

import densectx.cli
from densectx.building import instantiate
from densectx.config import compose


def wait(pid, seconds):
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def child(asked):
    os.setsid()
    os.chdir(asked["folder"])
    os.environ.update(asked["environment"])
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    sys.argv = ["densectx", *asked["start"]]
    densectx.cli.run()


def main():
    torch.set_num_threads(1)  # threads of a pool would not be there after a fork; one needs no pool
    _, _, data = instantiate(compose([sys.argv[1]], []).values, Path("warm"), "fit")
    next(iter(data.val_dataloader()))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            pid = os.fork()
            if pid == 0:
                child(asked)
            answer = pid
        else:
            answer = wait(asked["wait"], asked["seconds"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
