"""How a training step scales from 1 to 1024 GPUs, on paper: an alpha-beta model -> ``results/scaling.json``, ``.md``.

    python benchmarks/scaling.py [--steps 30] [--skip-measuring]

Three parts. *Measured*: one and two gloo ranks of this machine: time of an all-reduce against its bytes (fits alpha
and beta), time of a step alone, of two steps side by side without exchange, and of a DDP step, which the model must
foretell from the other numbers. *Published*: what the model says of clusters whose efficiencies others have measured.
*Projected*: models of densectx on clusters that nobody has run them on; assumptions are in the file. The last part is
paper, and says so.

The model of a step on N ranks:

- backward produces gradients; a bucket (torch's ``bucket_cap_mb``) is exchanged when it is full and the one before it
  is through, so a step takes max(compute, exchange) plus what the last bucket adds;
- exchange of n bytes: 2 (N-1)/N n / B + 2 h alpha, B the slowest link a ring passes (inside a machine the bus of the
  GPUs, between machines the network card, shared by nobody: a ring enters and leaves a machine once), h the hops:
  log2 N of a tree or of halving and doubling, N-1 of a ring (all that NCCL had before 2019);
- ranks wait for the slowest: compute * (1 + spread * sqrt(2 ln N)), the expected maximum of N normal deviates;
- the loader delivers at most its rate; saving costs its seconds every interval; failures come every MTBF / N and cost
  half an interval and a restart, with the interval that makes the sum least (Young 1974: sqrt(2 save MTBF / N)).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from record import RESULTS, commit, machine
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from densectx.inspection.cost import cost
from densectx.model import DenseModel
from densectx.types import SourceInfo

JSON, MARKDOWN = RESULTS / "scaling.json", RESULTS / "scaling.md"
RANKS = [2**k for k in range(11)]
MIB = 2**20
HOUR = 3600.0


@final
@dataclass(frozen=True)
class Cluster:
    """What joins the ranks: bytes and seconds."""

    name: str
    gpus: int  # of a machine
    bus: float  # bytes/s between the GPUs of a machine
    network: float  # bytes/s of a machine's network
    alpha: float  # seconds of one hop between machines
    alpha_bus: float = 5e-6
    ring: bool = False  # whether messages go all the way round

    def exchange(self, size: float, world: int) -> float:
        """Seconds of an all-reduce."""
        if world == 1:
            return 0.0
        inside = world <= self.gpus
        bandwidth = self.bus if inside else min(self.bus, self.network)
        hop = self.alpha_bus if inside else self.alpha
        hops = world - 1 if self.ring else math.log2(world)
        return 2 * (world - 1) / world * size / bandwidth + 2 * hops * hop


@final
@dataclass(frozen=True)
class Work:
    """A step of one rank: seconds, bytes, images."""

    name: str
    forward: float
    backward: float
    gradient: float  # bytes exchanged
    images: int
    ready: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    """(share of the backward's time, share of the bytes that it makes), first to last."""
    optimizer: float = 0.0
    spread: float = 0.02
    bucket: float = 25 * MIB
    accumulate: int = 1
    loader: float = math.inf  # images/s of a rank
    checkpoint: float = 0.0  # seconds of a save
    mtbf: float = math.inf  # seconds of one GPU
    restart: float = 300.0


def step(work: Work, cluster: Cluster, world: int) -> dict[str, float]:
    """Seconds of an optimizer step and what they go into."""
    slow = 1 + work.spread * math.sqrt(2 * math.log(world)) if world > 1 else 1.0
    compute = (work.forward + work.backward) * slow
    # the bytes made until a time in the backward, piecewise linear
    exchanged, produced, elapsed, bucket = 0.0, 0.0, work.forward * slow, 0.0
    for share, part in work.ready:
        seconds, size = share * work.backward * slow, part * work.gradient
        done = 0.0
        while done < size:
            take = min(work.bucket - bucket, size - done)
            done, bucket, produced = done + take, bucket + take, produced + take
            now = elapsed + seconds * done / size
            if bucket >= work.bucket or produced >= work.gradient - 1:
                exchanged = max(exchanged, now) + cluster.exchange(bucket, world)
                bucket = 0.0
        elapsed += seconds
    last = max(compute, exchanged if world > 1 else 0.0)
    total = (work.accumulate - 1) * compute + last + work.optimizer
    total = max(total, work.accumulate * work.images / work.loader)
    mtbf = work.mtbf / world
    lost, interval = 0.0, 600.0
    if math.isfinite(mtbf):
        interval = math.sqrt(2 * work.checkpoint * mtbf) if work.checkpoint else 600.0
        lost = work.checkpoint / interval + (interval / 2 + work.restart) / mtbf
    return {
        "step_s": total / (1 - min(lost, 0.99)),
        "compute_s": work.accumulate * compute,
        "exposed_exchange_s": last - compute,
        "lost_to_failures": lost,
        "save_every_s": interval,
    }


def efficiency(work: Work, cluster: Cluster, world: int, base: int = 1) -> float:
    """Images/s of a rank beside those of a rank among ``base``."""
    return step(work, cluster, base)["step_s"] / step(work, cluster, world)["step_s"]


# measured


def network() -> nn.Module:
    """A small dense model, whole: a step of a CPU core is some tenths of a second."""
    torch.manual_seed(0)
    return DenseModel.from_config(
        {
            "backbone": {"name": "timm", "model": "resnet18", "output_stride": 8},
            "projection": {"channels": 64},
            "norm": "frozen",
            "tasks": {"segmentation": {"name": "segmentation", "source": "a"}},
        },
        {"a": SourceInfo(classes=("x", "y"), keys=("image", "mask"))},
    )


@final
class Answer(nn.Module):
    """What DDP wraps: an image to a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> a scalar."""
        outputs: dict[str, torch.Tensor] = self.model({"segmentation": x})
        return outputs["segmentation"].square().mean()


def median_of(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of a call, and the standard deviation of its middle half beside them."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    kept = sorted(times[2:])
    middle = kept[len(kept) // 4 : -(len(kept) // 4) or None]
    return statistics.median(kept), statistics.pstdev(middle) / statistics.median(kept)


def rank_body(rank: int, world: int, port: int, steps: int, out: str) -> None:
    """Of one process: every measurement; rank 0 writes them."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(rank))
    answer = Answer()
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        distributed.init_process_group("gloo", rank=rank, world_size=world)
        sizes = [2**k for k in range(2, 27, 3)]
        found["exchange"] = []
        for size in sizes:
            numbers = torch.zeros(size // 4)
            distributed.barrier()
            found["exchange"].append((size, median_of(lambda n=numbers: distributed.all_reduce(n), 10)[0]))
        distributed.barrier()

    def one_step(module: nn.Module) -> None:
        module.zero_grad()
        module(x).backward()

    with torch.no_grad():
        found["forward"] = median_of(lambda: answer(x), steps)[0]
    found["alone"], found["spread"] = median_of(lambda: one_step(answer), steps)
    found["gradient"] = sum(4 * p.numel() for p in answer.parameters() if p.requires_grad)
    if world > 1:
        found["ddp"] = {}
        for cap in (1, 25, 1000):
            wrapped = DistributedDataParallel(answer, bucket_cap_mb=cap)
            distributed.barrier()
            found["ddp"][cap] = median_of(lambda w=wrapped: one_step(w), steps)[0]
        distributed.destroy_process_group()
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")


def measured(steps: int, folder: Path) -> dict[str, Any]:
    """One rank, then two, and what the model says of the two from everything but their DDP step."""
    found = {}
    for world in (1, 2):
        out = folder / f"scaling-{world}.json"
        port = 20_000 + os.getpid() % 20_000 + world
        multiprocessing.start_processes(rank_body, (world, port, steps, str(out)), nprocs=world, start_method="spawn")
        found[world] = json.loads(out.read_text(encoding="utf-8"))
        out.unlink()
    two = found[2]
    alpha, beta = fit(two["exchange"])
    here = Cluster("two gloo ranks of this machine", 1, 1 / beta, 1 / beta, alpha / 2)
    foretold = {}
    for cap, seconds in two["ddp"].items():
        work = Work("", two["forward"], two["alone"] - two["forward"], two["gradient"], 2, spread=0.0)
        said = step(replace(work, bucket=float(cap) * MIB), here, 2)["step_s"]
        foretold[cap] = {"measured_s": seconds, "model_s": said, "ratio": said / seconds}
    return {
        "one_rank_step_s": found[1]["alone"],
        "two_ranks_without_exchange_step_s": two["alone"],
        "gradient_bytes": two["gradient"],
        "alpha_s": alpha,
        "bytes_per_s": 1 / beta,
        "exchange": two["exchange"],
        "spread_of_steps": two["spread"],
        "ddp_step_by_bucket_mib": foretold,
    }


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds = alpha + beta * bytes, by least squares on relative errors (sizes span many orders)."""
    sizes = torch.tensor([float(size) for size, _ in points], dtype=torch.float64)
    seconds = torch.tensor([s for _, s in points], dtype=torch.float64)
    rows = torch.stack([1 / seconds, sizes / seconds], 1)
    solved = torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution.flatten()
    return max(float(solved[0]), 1e-7), max(float(solved[1]), 1e-13)


# published

# Hops are not published with the efficiencies: 10 and 50 us are usual for such networks. The ring and its 10 us were
# chosen with Horovod's efficiencies in view (log2 N hops of 30 us said 81 % for VGG-16 on 512): its rows are no test.
_ROCE = Cluster("4 Pascal GPUs a machine, 25 Gbit/s RoCE", 4, 10e9, 25e9 / 8, 1e-5, ring=True)
_BIG_BASIN = Cluster("8 P100 a machine, 50 Gbit/s Ethernet", 8, 20e9, 50e9 / 8, 5e-5)
_HOROVOD = "horovod.readthedocs.io, benchmarks (batch 64)"
# seconds a step from the images/s of one P100 in tensorflow.org/performance/benchmarks (2017): 142, 219, 154
_INCEPTION = Work("Inception V3", 0.15, 0.30, 95e6, 64, bucket=64 * MIB)  # Horovod fuses 64 MiB
# nine tenths of VGG-16's bytes are fully connected layers, the first to come out of the backward
_VGG = Work("VGG-16", 0.14, 0.28, 553e6, 64, ((0.05, 0.89), (0.95, 0.11)), bucket=64 * MIB)
PUBLISHED: list[tuple[Work, Cluster, int, int, float, str]] = [
    (_INCEPTION, _ROCE, 128, 1, 0.90, _HOROVOD),
    (_INCEPTION, _ROCE, 512, 1, 0.90, _HOROVOD),
    (_VGG, _ROCE, 128, 1, 0.79, _HOROVOD),
    (_VGG, _ROCE, 512, 1, 0.68, _HOROVOD),
    (Work("ResNet-50", 0.05, 0.10, 102e6, 32), _BIG_BASIN, 256, 8, 0.90, "Goyal et al. 2017, arXiv 1706.02677"),
]

# projected

_H100, _USE = 989e12, 0.35  # FLOP/s of dense bf16; the share of it that a step reaches, assumed
_MTBF = 16384 * 54 * 24 * HOUR / 419  # of one GPU: 419 unexpected interruptions, Llama 3 (arXiv 2407.21783)
CLUSTERS = [
    Cluster("8 H100 a machine, 8 x 400 Gbit/s", 8, 300e9, 400e9, 1e-5),
    Cluster("8 H100 a machine, 100 Gbit/s", 8, 300e9, 12.5e9, 3e-5),
    Cluster("1 GPU a machine, 10 Gbit/s", 1, 1.25e9, 1.25e9, 5e-5),
]


def projected_works() -> list[Work]:
    """Models of densectx on an H100."""
    works = []
    for name, backbone, size, images in (
        ("dilated ResNet-34 + Basic, 480x352, 8 images", {"name": "dilated_resnet34"}, (352, 480), 8),
        ("dilated VGG-16 + Basic, 480x352, 8 images", {"name": "dilated_vgg16"}, (352, 480), 8),
        ("plain 64 + context7 denoiser, 70x70, 32 images", {"name": "plain", "width": 64}, (70, 70), 32),
    ):
        dense = "denoiser" in name
        spec = {"name": "denoising", "sigma": 25} if dense else {"name": "segmentation"}
        config: dict[str, Any] = {"backbone": backbone, "tasks": {"t": {**spec, "source": "a"}}}
        config |= {"projection": None, "context": "context7"} if dense else {}
        info = SourceInfo(classes=tuple(f"c{i}" for i in range(11)), keys=("image", "mask"))
        with torch.device("meta"):
            model = DenseModel.from_config(config, {"a": info})
        total = cost(model, size).total
        forward = 2 * total.macs * images / (_H100 * _USE)
        numbers = 12 * total.parameters  # weights and AdamW's two moments, 4 bytes each
        works.append(
            Work(
                name,
                forward,
                2 * forward,
                4 * total.parameters,
                images,
                optimizer=numbers * 3 / 3e12,  # read and written once in 3 TB/s
                checkpoint=1 + numbers / 1e9,  # 1 GB/s and a second of overhead
                mtbf=_MTBF,
            )
        )
    return works


SWITCHES: dict[str, Callable[[Work], Work]] = {
    "as it is": lambda w: w,
    "bf16 gradients (a DDP communication hook)": lambda w: replace(w, gradient=w.gradient / 2),
    "accumulate_grad_batches: 4": lambda w: replace(w, accumulate=4),
    "4 x batch_size": lambda w: replace(w, forward=4 * w.forward, backward=4 * w.backward, images=4 * w.images),
    "one bucket": lambda w: replace(w, bucket=w.gradient),
}


def projected() -> list[dict[str, Any]]:
    """Every model on every cluster: efficiency by ranks, where it falls below 80 %, which switch helps most there."""
    rows = []
    for cluster in CLUSTERS:
        for work in projected_works():
            curve = {world: efficiency(work, cluster, world) for world in RANKS}
            limit = next((world for world, value in curve.items() if value < 0.8), None)
            at = limit or RANKS[-1]
            helped = {name: efficiency(change(work), cluster, at) for name, change in SWITCHES.items()}
            rows.append(
                {
                    "model": work.name,
                    "cluster": cluster.name,
                    "step_s": step(work, cluster, 1)["step_s"],
                    "efficiency": curve,
                    "below_80_percent_at": limit,
                    "images_per_s_at_1024": 1024 * work.images / step(work, cluster, 1024)["step_s"],
                    "loader_images_per_s_of_a_machine": cluster.gpus * work.images / step(work, cluster, 1)["step_s"],
                    "efficiency_there_with": helped,
                    "best_switch": max(helped, key=lambda name: helped[name]),
                    "parts_at_1024": step(work, cluster, 1024),
                    "work": asdict(work) | {"mtbf": work.mtbf, "loader": None},
                }
            )
    return rows


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    on = f"{found['machine']['cores']} cores of {found['machine']['processor']}"
    lines = ["# Scaling of a training step", "", f"`{found['command']}` at {found['commit'][:7]}, {on}.", ""]
    if here := found.get("measured"):
        lines += ["## Measured: two gloo ranks of one machine, foretold by the model", ""]
        lines += ["| bucket, MiB | DDP step, ms | model, ms | model / measured |", "|---|---|---|---|"]
        for cap, row in here["ddp_step_by_bucket_mib"].items():
            numbers = f"{1e3 * row['measured_s']:.0f} | {1e3 * row['model_s']:.0f} | {row['ratio']:.2f}"
            lines.append(f"| {cap} | {numbers} |")
        alone = f"{1e3 * here['one_rank_step_s']:.0f} ms one rank alone"
        beside = f"{1e3 * here['two_ranks_without_exchange_step_s']:.0f} ms two side by side without exchange"
        link = f"alpha {1e6 * here['alpha_s']:.0f} us, {here['bytes_per_s'] / 1e9:.2f} GB/s"
        lines += ["", f"A step: {alone}, {beside}; {here['gradient_bytes'] / 1e6:.0f} MB of gradients; {link}.", ""]
    lines += ["## Published: clusters that others have measured", ""]
    lines += ["| model | cluster | ranks | published | this model | source |", "|---|---|---|---|---|---|"]
    for row in found["published"]:
        ranks = f"{row['ranks']} against {row['base']}"
        values = f"{row['published']:.0%} | {row['model_says']:.0%}"
        lines.append(f"| {row['model']} | {row['cluster']} | {ranks} | {values} | {row['source']} |")
    lines += ["", "## Projected, on paper: nobody has run these", ""]
    shown = [1, 8, 16, 64, 256, 1024]
    lines += ["| model | cluster | " + " | ".join(map(str, shown)) + " | below 80 % at | what helps most there |"]
    lines += ["|---" * (4 + len(shown)) + "|"]
    for row in found["projected"]:
        curve = " | ".join(f"{row['efficiency'][world]:.0%}" for world in shown)
        best = f"{row['best_switch']}: {row['efficiency_there_with'][row['best_switch']]:.0%}"
        lines.append(f"| {row['model']} | {row['cluster']} | {curve} | {row['below_80_percent_at'] or '-'} | {best} |")
    lines += ["", f"Assumed: {found['assumed']}", ""]
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each kind")
    parser.add_argument("--skip-measuring", action="store_true", help="keep what the file has of this machine")
    given = parser.parse_args()
    old = json.loads(JSON.read_text(encoding="utf-8")) if JSON.exists() else {}
    found = {
        "name": "scaling",
        "command": "python benchmarks/scaling.py" + (f" --steps {given.steps}" if given.steps != 30 else ""),
        "commit": commit(),
        "machine": machine(),
        "measured": old.get("measured") if given.skip_measuring else measured(given.steps, RESULTS),
        "published": [
            {
                "model": work.name,
                "cluster": cluster.name,
                "ranks": world,
                "base": base,
                "published": said,
                "model_says": efficiency(work, cluster, world, base),
                "source": source,
            }
            for work, cluster, world, base, said, source in PUBLISHED
        ],
        "projected": projected(),
        "assumed": f"H100 at {_USE:.0%} of {_H100 / 1e12:.0f} TFLOP/s (not measured), a backward of two forwards, steps"
        f" that vary by 2 %, one failure every {_MTBF / HOUR:.0f} GPU hours (Llama 3, arXiv 2407.21783), 300 s a"
        " restart, a loader that keeps up.",
    }
    JSON.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    MARKDOWN.write_text(tables(found), encoding="utf-8")
    sys.stdout.write(MARKDOWN.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
