"""A real process group: whether all ranks find each other, agree, and how fast they exchange numbers.

Started by torchrun, srun or variables, this process joins the others where training would meet them, by Lightning's own
reading of the variables. Started alone, it starts two processes on this machine.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, final

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, not in its __all__

import densectx
from densectx.doctor.findings import Finding
from densectx.errors import DistributedError
from densectx.imports import child_command

LOCAL: Final = 2  # processes of a machine without GPUs
_CHILD: Final = "from densectx.doctor.group import child; child()"
_REPEATS: Final = 20
_LARGE: Final = 64 * 2**20  # bytes of the large exchange, the gradients of a ResNet-34 in bf16 are of that order


@final
@dataclass(frozen=True)
class Place:
    """Where this process stands among the others."""

    rank: int
    world: int
    address: str
    port: int
    served: bool  # whether the launcher holds the store, so that no rank has to
    nccl: bool = False  # whether ranks have a GPU each


def place() -> Place | None:
    """Where a launcher put this process; None if there is none."""
    from lightning_fabric.plugins import environments as module

    environments: Any = module  # the classes are documented there, though not in its __all__
    environment: Any
    if environments.TorchElasticEnvironment.detect():
        environment = environments.TorchElasticEnvironment()
        world, rank = environment.world_size(), environment.global_rank()
    elif "SLURM_STEP_ID" in os.environ and environments.SLURMEnvironment.detect():
        environment = environments.SLURMEnvironment(auto_requeue=False)
        world, rank = environment.world_size(), environment.global_rank()
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        environment = environments.LightningEnvironment()
        world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ.get("RANK", "0"))
    else:
        return None
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    cuda = torch.cuda.is_available()
    return Place(rank, world, environment.main_address, environment.main_port, served, cuda) if world > 1 else None


def joined(here: Place, seconds: float) -> dict[str, Any]:
    """Meet the others and measure; the same answer on every rank.

    Args:
        here: of this process.
        seconds: to wait for each other.

    Returns:
        ``{world, hosts, rendezvous_s, backends: {name: {latency_ms, gigabytes_per_s}}, differs}``; ``differs`` is
        {what: {value: ranks}} of versions that are not the same everywhere.

    Raises:
        DistributedError: ranks that did not come, an address that nobody answers at, a wrong sum.
    """
    start, where = time.perf_counter(), f"{here.address}:{here.port}"
    patience = timedelta(seconds=seconds)
    try:
        store = TCPStore(
            here.address,
            here.port,
            here.world,
            is_master=here.rank == 0 and not here.served,
            timeout=patience,
            wait_for_workers=False,
        )
        store.set(f"doctor/{here.rank}", socket.gethostname())
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        fix = "another port: MASTER_PORT" if "EADDRINUSE" in str(error) else "is MASTER_ADDR the machine of rank 0?"
        raise DistributedError(f"rank {here.rank}: no meeting at {where}: {reason}; {fix}") from error
    until = time.monotonic() + seconds
    missing = list(range(here.world))
    while missing := [rank for rank in missing if not store.check([f"doctor/{rank}"])]:
        if time.monotonic() > until:
            raise DistributedError(
                f"rank {here.rank}: of {here.world} ranks {', '.join(map(str, missing))} did not come to {where} within"
                f" {seconds:g} s; are their processes started, with the same WORLD_SIZE and MASTER_ADDR?"
            )
        time.sleep(0.05)
    hosts = [store.get(f"doctor/{rank}").decode(errors="backslashreplace") for rank in range(here.world)]
    found: dict[str, Any] = {"world": here.world, "hosts": hosts, "rendezvous_s": time.perf_counter() - start}
    found["backends"] = {}
    for backend in ["gloo", *(["nccl"] if here.nccl else [])]:
        distributed.init_process_group(
            backend,
            store=PrefixStore(backend, store),
            rank=here.rank,
            world_size=here.world,
            timeout=patience,
        )
        try:
            found["backends"][backend] = _exchange(here, backend)
            found.setdefault("differs", _differences(here.world))
            distributed.barrier()
        except RuntimeError as error:
            raise DistributedError(f"rank {here.rank}: {backend}: {str(error).splitlines()[0]}") from error
        finally:
            distributed.destroy_process_group()
    return found


def _exchange(here: Place, backend: str) -> dict[str, float]:
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", here.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)

    def seconds(count: int, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            numbers = torch.full((count,), float(here.rank), device=device)
            start = time.perf_counter()
            distributed.all_reduce(numbers)
            total = numbers.sum().item() / count  # waits for the device
            times.append(time.perf_counter() - start)
            if total != here.world * (here.world - 1) / 2:
                raise DistributedError(f"rank {here.rank}: {backend} sums ranks to {total}, which is wrong.")
        return statistics.median(times)

    latency, large = seconds(1, _REPEATS), seconds(_LARGE // 4, 3)
    return {"latency_ms": latency * 1e3, "gigabytes_per_s": _LARGE / large / 1e9}


def _differences(world: int) -> dict[str, dict[str, list[int]]]:
    mine = {"densectx": densectx.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    everyone: list[Any] = [None] * world
    distributed.all_gather_object(everyone, mine)
    differs = {}
    for what in mine:
        ranks: dict[str, list[int]] = {}
        for rank, values in enumerate(everyone):
            ranks.setdefault(values[what], []).append(rank)
        if len(ranks) > 1:
            differs[what] = ranks
    return differs


def local(seconds: float) -> dict[str, Any]:
    """The answer of processes of this machine: one a GPU, two without.

    Raises:
        DistributedError: one of them failed or did not end.
    """
    world = max(torch.cuda.device_count(), LOCAL) if torch.cuda.is_available() else LOCAL
    nccl = torch.cuda.is_available() and torch.cuda.device_count() >= world  # it takes no two ranks of one GPU
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    try:
        for rank in range(world):
            told = {"rank": rank, "world": world, "port": port, "seconds": seconds, "nccl": nccl}
            command, environment = child_command("-c", _CHILD, json.dumps(told))
            environment["OMP_NUM_THREADS"] = "1"
            pipe = subprocess.PIPE
            children.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        answers = []
        for rank, child_ in enumerate(children):
            try:
                said, complaint = child_.communicate(timeout=2 * seconds + 60)
            except subprocess.TimeoutExpired as error:
                raise DistributedError(f"process {rank} of {world} on this machine did not end.") from error
            if child_.returncode:
                reason = (complaint.strip().splitlines() or ["no reason given"])[-1]
                raise DistributedError(f"process {rank} of {world} on this machine failed: {reason}")
            answers.append(said)
        found: dict[str, Any] = json.loads(answers[0].strip().splitlines()[-1])
        return found
    finally:
        for child_ in children:
            if child_.poll() is None:
                child_.kill()
            child_.wait()


def child() -> None:
    """The body of one of the processes of :func:`local`."""
    told = json.loads(sys.argv[1])
    here = Place(told["rank"], told["world"], "127.0.0.1", told["port"], served=False, nccl=told["nccl"])
    try:
        sys.stdout.write(json.dumps(joined(here, told["seconds"])) + "\n")
    except DistributedError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.status)


def findings(found: Mapping[str, Any]) -> list[Finding]:
    """What was measured as lines of the answer."""
    hosts = list(dict.fromkeys(found["hosts"]))
    met = (
        f"{found['world']} ranks on {len(hosts)} machine{'s' * (len(hosts) != 1)} met in {found['rendezvous_s']:.1f} s"
    )
    lines = [Finding("process group", met)]
    for backend, speed in found["backends"].items():
        measured = f"{speed['latency_ms']:.2f} ms for a number, {speed['gigabytes_per_s']:.2f} GB/s for 64 MiB"
        lines.append(Finding(backend, f"all-reduce right; {measured}"))
    for what, ranks in found["differs"].items():
        text = ", ".join(f"{value} on ranks {', '.join(map(str, some))}" for value, some in ranks.items())
        lines.append(Finding(what, text, "problem", f"the same {what} on every machine", 7))
    return lines
