"""Ranks with different numbers of samples, down to none: every sample counts once, and nobody waits for ever."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.xdist_group("processes")

# a batch norm, since its buffers are what DDP exchanges in every forward pass
CODE = """
import json, warnings
from functools import partial
import pytorch_lightning as pl
import torch
from densectx import DataModule, DenseModel, DenseModule

warnings.filterwarnings("ignore")

class Count(pl.Callback):
    def __init__(self):
        self.samples, self.statistics = 0, 0

    def on_validation_batch_end(self, trainer, module, outputs, batch, *args):
        self.statistics = sum(buffer.double().sum().item() for buffer in module.buffers())
        self.samples += len(outputs["denoising"][0]) if outputs else 0

def metrics(trainer):
    return {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}

def built(samples):
    source = {"name": "mosaic", "size": 16, "length": samples, "val_length": samples, "batch_size": 1}
    data = DataModule({"s": source}, num_workers=0)
    tasks = {"denoising": {"name": "denoising", "source": "s"}, "segmentation": {"name": "segmentation", "source": "s"}}
    torch.manual_seed(0)
    model = DenseModel.from_config(
        {"backbone": {"name": "timm", "model": "resnet10t"}, "projection": {"channels": 8, "activation": "none"},
         "tasks": tasks}, data.info()
    )
    for p in model.parameters():
        if not p.any():  # else heads that start at zero see nothing of the statistics
            torch.nn.init.normal_(p, std=0.05)
    count = Count()
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_steps=4, val_check_interval=4,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[count],
    )
    return DenseModule(model, partial(torch.optim.SGD, lr=0.01)), data, trainer, count

def counts(count):
    own = torch.tensor([count.samples, count.statistics], dtype=torch.float64)
    every = [torch.empty_like(own) for _ in range(world)]
    torch.distributed.all_gather(every, own) if world > 1 else every[0].copy_(own)
    samples, statistics = torch.stack(every).T.tolist()
    return {"counted": sum(samples), "statistics": len(set(statistics))}

found = {}
for samples in range(1, 8):
    module, data, trainer, count = built(samples)
    trainer.validate(module, datamodule=data, verbose=False)
    found[samples] = {**counts(count), **metrics(trainer)}
for samples in (1, 5):  # within training, where the module is wrapped by DDP
    module, data, trainer, count = built(samples)
    file = f"{words[0]}/{samples}.pt"
    if world > 1:
        trainer.fit(module, datamodule=data)
        if number == 0:
            torch.save(module.state_dict(), file)
    else:
        module.load_state_dict(torch.load(file))
        trainer.validate(module, datamodule=data, verbose=False)
    found[f"in training, {samples}"] = {**counts(count), **metrics(trainer)}
if number == 0:
    print("FOUND", json.dumps(found), flush=True)
"""


def found(said):
    return json.loads(next(line for line in said.splitlines() if line.startswith("FOUND"))[6:])


@pytest.mark.fault("D10")
def test_every_sample_counts_once(ranks, tmp_path, record_property):
    two = found(ranks(2, CODE, "uneven-2", [str(tmp_path)]))
    one = found(ranks(1, CODE, "uneven-1", [str(tmp_path)]))
    for key, values in two.items():
        assert values["counted"] == int(key.split()[-1])
        assert values["statistics"] == 1, "every rank measures with the running statistics that are saved"
        assert values == pytest.approx(one[key], nan_ok=True, rel=1e-5), key
    record_property("count", len(two))
