"""What the variables of a launcher say, and where they contradict each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from typing import Final

from densectx.doctor.findings import Finding

_NAMES: Final = (
    *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_NODELIST"),
    *("SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    *("NCCL_IB_DISABLE", "NCCL_DEBUG", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "DENSECTX_RUN"),
)
"""Those that are printed: a closed list, since the environment holds secrets too."""

_NUMBERS: Final = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_PORT"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_NUM_NODES"),
)


def cluster(environment: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """What the launcher says, by the variables of this process or the given ones."""
    given = os.environ if environment is None else environment
    said = {name: given[name] for name in _NAMES if name in given}
    if said:
        yield Finding("variables", " ".join(f"{name}={value}" for name, value in said.items()))
    yield Finding("launcher", launcher(given))
    yield from _numbers(given)
    yield from _address(given)
    yield from _slurm(given)
    if given.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and given.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        yield Finding(
            "restarts",
            "torchrun --max-restarts keeps stale addresses in the store that it shares with the workers",
            "warning",
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        )
    names = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wrong = [name for name in given.get(variable, "").lstrip("^=").split(",") if name]
        if wrong and not any(other.startswith(name) for name in wrong for other in names):
            fix = f"export {variable}=one of {', '.join(names)}"
            yield Finding(variable, f"no interface {', '.join(wrong)}", "problem", fix, 7)


def launcher(given: Mapping[str, str]) -> str:
    """Who started this process."""
    if "TORCHELASTIC_RUN_ID" in given:
        return f"torchrun, rank {given.get('RANK')} of {given.get('WORLD_SIZE')}"
    if "SLURM_PROCID" in given and "SLURM_STEP_ID" in given:
        return f"srun, rank {given['SLURM_PROCID']} of {given.get('SLURM_NTASKS')}"
    if "SLURM_JOB_ID" in given:
        return "inside a Slurm job, but not by srun: this process is alone"
    if "WORLD_SIZE" in given:
        return f"variables by hand, rank {given.get('RANK')} of {given['WORLD_SIZE']}"
    return "none: trainer.devices starts the processes of this machine"


def _numbers(given: Mapping[str, str]) -> Iterator[Finding]:
    for name in _NUMBERS:
        if given.get(name) and not given[name].isdecimal():
            yield Finding(name, f"{given[name]!r} is no number", "problem", f"unset {name}", 7)
            return
    world, rank = given.get("WORLD_SIZE"), given.get("RANK")
    if world and rank and int(rank) >= int(world):
        yield Finding("RANK", f"{rank} of {world}: ranks count from 0", "problem", "set RANK below WORLD_SIZE", 7)
    if world and int(world) > 1 and not given.get("MASTER_ADDR") and "SLURM_JOB_ID" not in given:
        fix = "export MASTER_ADDR=the first machine, MASTER_PORT=a free port there"
        yield Finding("MASTER_ADDR", f"not set, but WORLD_SIZE is {world}", "problem", fix, 7)


def _address(given: Mapping[str, str]) -> Iterator[Finding]:
    host = given.get("MASTER_ADDR")
    if not host:
        return
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)})
    except OSError as error:
        fix = "an address instead of the name, or a line in /etc/hosts of every machine"
        yield Finding("MASTER_ADDR", f"{host}: cannot be resolved: {error}", "problem", fix, 7)
        return
    yield Finding("MASTER_ADDR", f"{host} is {', '.join(found)}")


def _slurm(given: Mapping[str, str]) -> Iterator[Finding]:
    names = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_NUM_NODES")
    tasks, per_node, nodes = (given.get(name, "") for name in names)
    if all(map(str.isdecimal, (tasks, per_node, nodes))) and int(tasks) != int(per_node) * int(nodes):
        text = f"{tasks} tasks are not {per_node} on each of {nodes} nodes"
        yield Finding("SLURM_NTASKS", text, "problem", "#SBATCH --nodes and --ntasks-per-node, no --ntasks", 7)
