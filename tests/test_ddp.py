"""Two gloo processes give the gradients of one process with the same global batch."""

import os
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from densectx.model import DenseModel
from densectx.module import DenseModule
from densectx.resilience.failures import lost_a_rank
from densectx.types import SourceInfo

INFO = {
    "a": SourceInfo(classes=("x", "y", "z"), keys=("image", "mask")),
    "b": SourceInfo(classes=("x", "y"), keys=("image", "mask")),
}
TASKS = {
    "segmentation": {
        "name": "segmentation",
        "source": "a",
        "loss": {"name": "cross_entropy", "class_weights": [1, 2, 3]},
    },
    "other": {"name": "segmentation", "source": "b", "weight": 0.5},
    "denoising": {"name": "denoising", "source": "a", "loss": ["l1", {"name": "mse", "weight": 3}]},
    "colorization": {"name": "colorization", "source": "b"},
    "super_resolution": {"name": "super_resolution", "source": "b"},
}


class Step(nn.Module):
    """What Lightning's DDP wraps: one forward is one training step."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.training_step(batch, 0)


PICTURES = {
    "segmentation": TASKS["segmentation"],
    "second": {"name": "segmentation", "source": "a", "head": {"name": "decoder", "width": 8}},
}


def module_of(dtype, balancing, share, tasks=TASKS):
    torch.manual_seed(0)
    config = {
        "backbone": {"name": "timm", "model": "resnet10t"} if balancing == "fixed" else {"name": "plain", "width": 8},
        "projection": {"channels": 8},
        "context": {"name": "basic", "init_noise": 0.2, "share": share},
        "norm": "group",
        "tasks": tasks,
    }
    module = DenseModule(DenseModel.from_config(config, INFO), torch.optim.SGD, balancing=balancing).to(dtype)
    for p in module.parameters():
        if not p.any():  # residual parts that start at zero would hide what lies before them
            nn.init.normal_(p, std=0.05)
    return module


def batch_of(step, dtype):
    """The global batch of a step: joint, alternating, partial labels; uneven ignore pixels throughout."""
    rng = torch.Generator().manual_seed(step)
    batch = {}
    for source, classes in (("a", 3), ("b", 2)):
        if (step, source) in ((1, "b"), (2, "a")):  # alternating
            continue
        mask = torch.randint(0, classes, (4, 24, 24), generator=rng)
        mask[0, :20] = 255
        mask[3] = 255
        if step in (3, 4) and source == "a":
            mask[2:] = 255  # one rank has no labels at all
        gray = torch.tensor([False, True, step == 3, step == 3])
        image = torch.rand(4, 3, 24, 24, generator=rng, dtype=dtype)
        batch[source] = {"image": image, "mask": mask, "gray": gray, "key": torch.tensor([[0, i] for i in range(4)])}
    return batch


def shard(batch, rank, step):
    parts = {s: {k: v[2 * rank : 2 * rank + 2] for k, v in sample.items()} for s, sample in batch.items()}
    if step == 4 and rank == 1:
        del parts["a"]["mask"]  # nothing on this rank has the label, and its loader does not know of it
    return parts


def gradients(module):
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def run(rank, world, port, results):
    warnings.filterwarnings("ignore", ".*self.trainer.*")
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=120))
    found = {name: steps(rank, world, options) for name, options in CASES.items()}
    found["evaluation"] = evaluated(rank, world)
    if world > 1:
        distributed.destroy_process_group()
    if rank == 0:
        torch.save(found, results)


def steps(rank, world, options):
    dtype = options[0]
    module = module_of(*options)
    net = Step(module)
    if world > 1:
        net = DistributedDataParallel(net)  # plain: no flag for unused parameters
    found = []
    for step in range(5):
        batch = batch_of(step, dtype)
        module.zero_grad()
        net(shard(batch, rank, step) if world > 1 else batch).backward()
        module.on_before_optimizer_step(None)
        found.append(gradients(module))
    return found


def evaluated(rank, world):
    module = module_of(torch.float64, "fixed", True).eval()
    for step in range(5):
        batch = batch_of(step, torch.float64)
        module.validation_step(shard(batch, rank, step) if world > 1 else batch, 0)
    return module._evaluated.take(module.device)


CASES = {
    "fixed": (torch.float64, "fixed", True),
    "uncertainty": (torch.float64, "uncertainty", False),
    "uncertainty, float32": (torch.float32, "uncertainty", True),
    "famo": (torch.float64, "famo", True),
    "gradnorm": (torch.float64, "gradnorm", True),
    "pcgrad": (torch.float64, "pcgrad", True),
    "mgda": (torch.float64, "mgda", False),
    "imtl_g": (torch.float64, "imtl_g", True),
    "upgrad": (torch.float64, "upgrad", True),
    "features": (torch.float64, {"name": "nash_mtl", "of": "features"}, True, PICTURES),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory, free_port):
    """{case: gradients of the steps} by one process, and by two."""
    folder = tmp_path_factory.mktemp("ddp")
    one, two = folder / "one.pt", folder / "two.pt"
    run(0, 1, 0, one)
    started = multiprocessing.start_processes(run, (2, free_port(), two), nprocs=2, start_method="spawn", join=False)
    try:
        ended = any(started.join(timeout=5) for _ in range(60))
    finally:
        for process in started.processes:
            process.kill()
    assert ended, "the two processes did not end"
    return torch.load(one), torch.load(two)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(both, case):
    dtype, tolerance = CASES[case][0], 1e-5 if CASES[case][0] == torch.float32 else 1e-10
    for step, (single, double) in enumerate(zip(both[0][case], both[1][case], strict=True)):
        if step == 1 and case != "features":
            assert any(g is None for g in single.values()), "a task that no rank has labels for must not move"
        for name, gradient in single.items():
            if gradient is None:
                assert double[name] is None, (step, name)
                continue
            error = (double[name] - gradient).norm() / gradient.norm().clamp_min(
                1e-8 if dtype == torch.float32 else 1e-14
            )
            assert error < tolerance, (step, name, error)


def test_losses_of_an_evaluation_on_two_ranks_equal_those_on_one(both):
    single, double = (found["evaluation"] for found in both)
    assert single.keys() == TASKS.keys()
    assert double == pytest.approx(single, rel=1e-12)


def leave_alone(rank, store, results):
    """The second process stays silent while the first one has four collectives in flight."""
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=3))
    distributed.all_reduce(torch.ones(1))
    errors = []
    if rank == 0:
        for work in [distributed.all_reduce(torch.ones(100), async_op=True) for _ in range(4)]:
            try:
                work.wait()
            except RuntimeError as error:
                errors.append((str(error), lost_a_rank(error)))
        torch.save(errors, results)
        return
    while not results.exists():
        time.sleep(0.1)


def test_every_collective_in_flight_is_known_as_lost(tmp_path):
    """One of them says that its time was up, the others only that it closed their connections."""
    store, results = (tmp_path / "store").as_uri(), tmp_path / "errors.pt"
    started = multiprocessing.start_processes(leave_alone, (store, results), nprocs=2, start_method="spawn", join=False)
    try:
        while not started.join(timeout=5):
            pass
    finally:
        for process in started.processes:
            process.kill()
    errors = torch.load(results)
    assert len(errors) == 4
    assert all(lost for _, lost in errors), errors


def test_two_processes_train_like_one(tmp_path):
    """The whole command: two ranks with batch 2 end with the weights of one rank with batch 4."""
    root = Path(__file__).parents[1]
    flags = {
        "model.backbone": "{name: plain, width: 6}",
        "model.projection.channels": "6",
        "data.sources.mosaic.size": "24",
        "data.sources.mosaic.val_length": "5",
        "data.num_workers": "0",
        "trainer.max_steps": "3",
        "trainer.val_check_interval": "3",
        "trainer.precision": "32",
        "model.lr_scheduler": "null",
        "model.optimizer": "{class_path: torch.optim.SGD, init_args: {lr: 0.01}}",
        "trainer.enable_progress_bar": "false",
    }
    states, tables = [], []
    for name, more in (
        ("one", {"data.sources.mosaic.batch_size": "4"}),
        ("two", {"data.sources.mosaic.batch_size": "2", "trainer.devices": "2", "trainer.strategy": "ddp"}),
    ):
        words = [
            w for k, v in (flags | more | {"trainer.default_root_dir": str(tmp_path)}).items() for w in (f"--{k}", v)
        ]
        command = [
            sys.executable,
            "-m",
            "densectx",
            "fit",
            "-c",
            str(root / "configs" / "quickstart.yaml"),
            "--name",
            name,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        environment.pop("DENSECTX_RUN", None)
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        content = torch.load(tmp_path / name / "0" / "checkpoints" / "last.ckpt", weights_only=True)
        states.append(content["state_dict"])
        tables.append((tmp_path / name / "0" / "metrics.csv").read_text().splitlines())
        assert len(list((tmp_path / name).iterdir())) == 1, "one run folder for all ranks"
    for key, value in states[0].items():
        assert torch.allclose(states[1][key], value, atol=1e-5), key
    first, second = (
        {k: v for k, v in zip(t[0].split(","), t[-1].split(","), strict=True) if k.startswith("val/")} for t in tables
    )
    assert first.keys() == second.keys()
    assert any(first.values())
    assert first["val/denoising/loss"]
    for key, value in first.items():
        assert float(second[key]) == pytest.approx(float(value), rel=1e-3), key


RATES = """
from pathlib import Path

import pytorch_lightning as pl


class Rates(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with (Path(__file__).parent / f"rates-{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{trainer.optimizers[0].param_groups[0]['lr']!r}\\n")
"""


def test_ranks_share_the_clock_of_a_timed_schedule(tmp_path):
    """Their clocks differ, their learning rates must not: DDP never looks at the weights again."""
    root = Path(__file__).parents[1]
    (tmp_path / "rates_of_ranks.py").write_text(RATES)
    flags = {
        "model.backbone": "{name: plain, width: 6}",
        "model.projection.channels": "6",
        "model.lr_scheduler.init_args": "{total_steps: null, timed: true}",
        "data.sources.mosaic.size": "24",
        "data.sources.mosaic.val_length": "2",
        "data.num_workers": "0",
        "trainer.default_root_dir": str(tmp_path),
        "trainer.devices": "2",
        "trainer.strategy": "ddp",
        "trainer.max_steps": "6",
        "trainer.max_time": "00:00:02:00",
        "trainer.val_check_interval": "6",
        "trainer.precision": "32",
        "trainer.callbacks": "[{class_path: rates_of_ranks.Rates}]",
        "trainer.enable_progress_bar": "false",
    }
    words = ["-c", str(root / "configs" / "quickstart.yaml"), "--allow-import", "rates_of_ranks", "--no-report"]
    words += [word for key, value in flags.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    environment.pop("DENSECTX_RUN", None)
    command = [sys.executable, "-m", "densectx", "fit", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"rates-{rank}.txt").read_text().split() for rank in (0, 1))
    assert first == second
    assert len(set(first)) == 6
