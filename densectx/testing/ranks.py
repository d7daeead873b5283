"""Two real processes (gloo, CPU) against one: the gradients of a training step."""

from __future__ import annotations

import re
import subprocess
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, final

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from densectx.imports import allow_import, child_command
from densectx.model import DenseModel
from densectx.module import DenseModule
from densectx.testing.modules import stir
from densectx.testing.report import expect
from densectx.testing.samples import take
from densectx.testing.task_case import SOURCE, TaskCase
from densectx.types import Sample, SourceInfo

SECONDS: Final = 240
_CODE: Final = "import sys; from densectx.testing.ranks import rank; rank(int(sys.argv[1]), sys.argv[2])"


@final
class _Step(nn.Module):
    """What DDP wraps: one forward is one training step."""

    def __init__(self, module: DenseModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Sample) -> Tensor:
        return self.module.training_step({SOURCE: batch}, 0)


def two_processes_equal_one(case: TaskCase) -> None:
    """Two processes with half of a batch each have the gradients of one process with all of it."""
    spec = _importable(case)
    info = case.info
    work = {
        "config": case.config({**spec, "source": SOURCE}, info, None),
        "info": info.to_config(),
        "batch": case.batch(),
        "package": re.split(r"[.:]", spec["name"])[0] if ":" in spec["name"] else "",
    }
    with TemporaryDirectory() as folder:
        torch.save(work, Path(folder, "work.pt"))
        command, environment = child_command("-c", _CODE)
        environment["OMP_NUM_THREADS"] = "1"
        ranks = [
            subprocess.Popen(
                [*command, str(rank), folder], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for rank in (0, 1)
        ]
        said = []
        for process in ranks:
            try:
                said.append(process.communicate(timeout=SECONDS)[1].decode(errors="backslashreplace").strip())
            except subprocess.TimeoutExpired:
                said.append(f"no answer within {SECONDS} s")
            finally:
                process.kill()
        failed = next((text for process, text in zip(ranks, said, strict=True) if process.returncode), None)
        advice = "name it by an entry point, or define its class at the top of a module that other processes can import"
        expect(failed is None, f"a second process failed: {(failed or '').splitlines()[-1:]}", advice)
        double = torch.load(Path(folder, "gradients.pt"), weights_only=True)
    single = _gradients(work, None)
    for name, gradient in single.items():
        error = (double[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        expect(
            bool(error < 1e-3),
            f"on two ranks the gradient of {name} differs by {error:.3g} (relative) from one process's",
            "return sum and weight, and mix nothing over the batch",
        )


def rank(number: int, folder: str) -> None:
    """The body of one of the two processes; the first one writes ``gradients.pt``."""
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    distributed.init_process_group(
        "gloo", init_method=store, rank=number, world_size=2, timeout=timedelta(seconds=SECONDS)
    )
    work = torch.load(Path(folder, "work.pt"), weights_only=True)
    found = _gradients(work, number)
    if number == 0:
        torch.save(found, Path(folder, "gradients.pt"))
    distributed.destroy_process_group()


def _gradients(work: dict[str, Any], number: int | None) -> dict[str, Tensor]:
    """Of one training step on the whole batch, or on the half of a rank."""
    warnings.filterwarnings("ignore", ".*self.trainer.*")
    if work["package"]:
        allow_import(work["package"])
    torch.manual_seed(0)
    model = DenseModel.from_config(work["config"], {SOURCE: SourceInfo.from_config(work["info"])})
    stir(model)
    module = DenseModule(model, partial(torch.optim.SGD, lr=0.1)).eval()  # no dropout, no batch statistics
    batch: Sample = work["batch"]
    step: nn.Module = _Step(module)
    if number is not None:
        count = len(batch["image"])
        batch = take(batch, range(count // 2) if number == 0 else range(count // 2, count))
        step = DistributedDataParallel(step)
    step(batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _importable(case: TaskCase) -> dict[str, Any]:
    """The subject as a spec that another process understands."""
    if isinstance(case.subject, str):
        return {"name": case.subject}
    if not callable(case.subject):
        return dict(case.subject)
    target: Any = case.subject.func if isinstance(case.subject, partial) else case.subject
    options = dict(case.subject.keywords) if isinstance(case.subject, partial) else {}
    expect(
        target.__module__ != "__main__" and "." not in target.__qualname__,
        f"{target.__qualname__} of {target.__module__} cannot be imported by another process",
        "name it by an entry point, or define it at the top of a module that can be imported",
    )
    return {"name": f"{target.__module__}:{target.__qualname__}", **options}
