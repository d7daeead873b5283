"""Parts with faults, for the configs of fault tests."""

import os
import resource
import signal
import time
from typing import final

import pytorch_lightning as pl
import torch
from torch import nn

from densectx.data.base import Dataset
from densectx.data.mosaic import Mosaic
from densectx.heads.base import Head
from densectx.heads.linear import Linear


@final
class Reader(Dataset):
    """Mosaic, but reading one index ``sleep``s long, kills its process, or gives NaN."""

    def __init__(self, *, split, how, at=5, length=48, size=24):
        self.mosaic, self.how, self.at = Mosaic(split=split, size=size, length=max(length, 1), val_length=6), how, at
        self.split, self.info = split, self.mosaic.info
        self.length = int(os.environ.get("FAULTY_LENGTH", length))

    def __len__(self):
        return self.length if self.split == "train" else len(self.mosaic)

    def __getitem__(self, index):
        if index == self.at and self.split == "train":
            if self.how == "sleep":
                with open("asleep", "w") as file:
                    file.write(str(os.getpid()))
                time.sleep(600)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "nan":
                sample = dict(self.mosaic[index])
                return {**sample, "image": sample["image"] * float("nan")}
        return self.mosaic[index]

    def name(self, index):
        return f"faulty-{index}"


@final
class Idle(Head):
    """Linear, beside parameters that take part in the loss on the first rank only, or with an operation."""

    def __init__(self, features, out_channels, how, scale=1, residual=False):
        super().__init__()
        self.linear, self.how = Linear(features, out_channels, scale, residual), how
        self.extra = nn.Parameter(torch.zeros(3))

    def forward(self, features, x):
        y = self.linear(features, x)
        if self.how == "put":  # torch: no deterministic implementation without accumulate
            y = y + torch.zeros(4).put_(torch.tensor([0]), torch.ones(1)).sum()
        if self.how == "put" or int(os.environ.get("LOCAL_RANK", "0")) == 0:
            y = y + self.extra.sum()
        return y


@final
class Poison(pl.Callback):
    """Not a number in a place at a step, on every rank or one; and what the weights of the step before were.

    Its files are named for ``what``: jobs that run at the same time share a working folder.
    """

    def __init__(self, what, step, rank=-1, times=1):
        super().__init__()
        self.what, self.step, self.rank, self.times = what, step, rank, times

    def setup(self, trainer, pl_module, stage):
        if self.what == "init":
            torch.manual_seed(trainer.global_rank)
            for parameter in pl_module.parameters():
                nn.init.normal_(parameter, std=0.1)
            torch.save(pl_module.model.state_dict(), f"init-{trainer.global_rank}.pt")

        if self.what == "loss":
            head = pl_module.model.task("segmentation").head
            head.register_forward_hook(
                lambda module, inputs, y: y * float("nan") if module.training and self.mine(trainer) else None
            )

    def mine(self, trainer):
        return self.step <= trainer.global_step < self.step + self.times and self.rank in (-1, trainer.global_rank)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            weights = {key: value.clone() for key, value in pl_module.model.state_dict().items()}
            torch.save(weights, f"{self.what}-before-{trainer.global_rank}.pt")
        if not self.mine(trainer):
            return
        named = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
        if self.what in ("parameter", "statistics"):
            name = (
                "model.tasks.segmentation.head.conv.weight"
                if self.what == "parameter"
                else next(name for name in named if name.endswith("running_mean"))
            )
            with torch.no_grad():
                named[name].view(-1)[0] = float("nan")
        elif self.what == "diverge":
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[0] += 1e-7

    def on_after_backward(self, trainer, pl_module):
        if self.what == "gradient" and self.mine(trainer):
            dict(pl_module.named_parameters())["model.tasks.segmentation.head.conv.weight"].grad.view(-1)[0] = float(
                "inf"
            )

    def on_exception(self, trainer, pl_module, exception):
        torch.save(pl_module.model.state_dict(), f"{self.what}-after-{trainer.global_rank}.pt")


@final
class Limit(pl.Callback):
    """From a step on the process gets no more than so many bytes of memory beyond those that it has."""

    def __init__(self, step, more):
        super().__init__()
        self.step, self.more = step, more

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[0])
            most = pages * resource.getpagesize() + self.more
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


@final
class Signals(pl.Callback):
    """Signals to the own process, each once: ``[number, step]`` before a training batch, or inside the validation.

    Step -1 is that of a run that is to stop.
    """

    def __init__(self, training, validation):
        super().__init__()
        self.training, self.validation = training, validation

    def send(self, numbers, trainer):
        for number, when in numbers:
            if when == (-1 if trainer.should_stop else trainer.global_step) and not os.path.exists(f"signal-{number}"):
                open(f"signal-{number}", "w").close()
                os.kill(os.getpid(), number)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.send(self.training, trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 2:
            self.send(self.validation, trainer)
