"""Our network and those of segmentation-models-pytorch on CamVid: what each reaches when all train for the same time.

    DENSECTX_DATA=DATA python benchmarks/peers.py WORK [--nets densectx Unet ...] [--minutes 20] [--lrs 5e-4 1e-3 2e-3]
    DENSECTX_DATA=DATA python benchmarks/peers.py fit -c CONFIG --model.backbone "{name: smp, arch: Unet}" [flags]

DATA holds ``camvid``, WORK is a folder for runs; what is done there is not done again. Needs the extra ``bench``. All
train by the data, augmentation, batch size, loss, optimiser and averaging of ``configs/recipes/camvid_20min.yaml`` from
random weights, one after the other on an otherwise quiet machine. That recipe was chosen for our network, on the same
frames; of the peers only the learning rate is. Ours keeps the first three stages of a ResNet-18, theirs have all four
of their encoder:

1. runs of a quarter of the time choose the learning rate on the 62 frames of 0001TP, if there are several;
2. the run itself, whose learning rate reaches zero at the end of the time; it is evaluated afterwards.

The time of an answer is measured in turns, all networks in one process. Writes ``benchmarks/results/NAME.json``. The
second form is ``densectx fit`` that knows the peers as backbones.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import segmentation_models_pytorch as smp
import torch
from record import RESULTS, ROOT, commit, machine, run_name
from results import figures
from speed import networks
from speed.timing import Arm, Plan, compare
from torch import Tensor

from densectx import cli
from densectx.backbones.base import Backbone, Standardize
from densectx.nn.resize import pad_to_multiple
from densectx.registry import BACKBONES
from densectx.types import Feature

CONFIG = "configs/recipes/camvid_20min.yaml"
PEERS = ("DeepLabV3", "DeepLabV3Plus", "Unet", "FPN", "PSPNet")
CLASSES = 11
LEAST = 32  # what the sides of their inputs must be multiples of
SIZE = (352, 480)  # of the timed answer: what no network has to pad, near CamVid's 360 x 480


@final
class Peer(Backbone):
    """A whole network of segmentation-models-pytorch up to its scores; the head ``upsample`` is its last step.

    (B, 3, H, W) -> [(B, classes, H / s, W / s)]. The head is half-pixel aligned as labels are; theirs aligns corners.

    Args:
        arch: class of segmentation_models_pytorch.
        encoder: its encoder, with random weights.
        classes: number of scores.
    """

    in_channels = 3

    def __init__(self, arch: str, encoder: str = "resnet18", classes: int = CLASSES) -> None:
        super().__init__()
        self.normalise = Standardize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        net = smp.create_model(arch, encoder_name=encoder, encoder_weights=None, classes=classes)
        self.encoder, self.decoder, self.scores = net.encoder, net.decoder, net.segmentation_head[0]
        self.stride = 1
        with torch.inference_mode():
            (scores,) = self.eval()(torch.zeros(1, 3, LEAST, LEAST))
        self.stride = LEAST // scores.shape[-1]
        self.features = (Feature(classes, self.stride),)
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        """See the class."""
        y = self.scores(self.decoder(self.encoder(pad_to_multiple(self.normalise(x), LEAST))))
        return [y[..., : x.shape[-2] // self.stride, : x.shape[-1] // self.stride]]


def main() -> int:
    """Command line."""
    BACKBONES.register("smp")(Peer)
    if sys.argv[1:2] == ["fit"]:
        return cli.main(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--nets", nargs="+", choices=("densectx", *PEERS), default=["densectx", *PEERS])
    parser.add_argument("--encoder", default="resnet18", help="of the peers")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="peers", help="of the file")
    parser.add_argument("--note", default="", help="what else is to be said of the runs, such as what ran beside them")
    parser.add_argument("--flags", default="", help="more flags of densectx fit, one text, for all networks")
    given = parser.parse_args()
    more = ["--seed_everything", str(given.seed), *shlex.split(given.flags)]
    rows = {net: trained(given, net, [*flags(net, given.encoder), *more]) for net in given.nets}
    (RESULTS / f"{given.name}.json").write_text(
        json.dumps(
            {
                "name": given.name,
                "command": f"DENSECTX_DATA=DATA python benchmarks/peers.py WORK {shlex.join(sys.argv[2:])}".strip(),
                "config": CONFIG,
                "minutes": given.minutes,
                "encoder": given.encoder,
                "seed": given.seed,
                "commit": commit(),
                "machine": machine() | {"threads": torch.get_num_threads()},
                "smp": smp.__version__,
                "note": given.note,
                "metric": "miou on 62 frames of 0001TP at 480x360, percent"
                + (", by which the learning rates were chosen" if len(given.lrs) > 1 else ""),
                "nets": rows,
                "inference": answers(given.nets, given.encoder),
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    return 0


def flags(net: str, encoder: str) -> list[str]:
    """What makes the network out of the recipe."""
    if net == "densectx":
        return []
    return [
        *("--model.backbone", f"{{name: smp, arch: {net}, encoder: {encoder}}}"),
        *("--model.projection", "null", "--model.context", "none", "--model.tasks.segmentation.head", "upsample"),
    ]


def trained(given: argparse.Namespace, net: str, own: list[str]) -> dict[str, Any]:
    """The runs of a network, see above."""

    def run(name: str, minutes: float, lr: float) -> dict[str, Any]:
        words = [*own, "--model.optimizer.init_args.lr", str(lr)]
        return fit(given.work, run_name(f"{net}-{name}", CONFIG, [str(minutes), *words]), minutes, words)

    tries: dict[float, dict[str, Any]] = {}
    if len(given.lrs) > 1:
        quarter = given.minutes / 4
        tries = {lr: run(f"lr-{lr}", quarter, lr) for lr in given.lrs}
    lr = max(tries, key=lambda rate: float(tries[rate]["miou"]), default=given.lrs[0])
    return {"tries": tries, "lr": lr, **run(f"{given.minutes:g}-minutes", given.minutes, lr)}


def fit(work: Path, name: str, minutes: float, own: list[str]) -> dict[str, Any]:
    """Run ``densectx fit`` for so long unless it has been run; what it reached."""
    folder = work / name
    if not any(folder.glob("*/done")):
        seconds = round(60 * minutes)
        command = [sys.executable, __file__, "fit", "-c", CONFIG, "--trainer.default_root_dir", str(work)]
        command += ["--name", name, "--trainer.limit_val_batches", "0"]
        command += ["--trainer.max_time", f"00:{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"]
        command += ["--trainer.enable_progress_bar", "false", "--no-report", *own]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        max(folder.glob("*"), key=lambda path: int(path.name)).joinpath("done").touch()
    file = next(folder.glob("*/done")).parent / "checkpoints" / "last.ckpt"
    step = int(torch.load(file, map_location="cpu", weights_only=True)["global_step"])
    miou = next(one for one in figures(file, ["camvid0001tp"]) if one.metric == "miou" and not one.trivial)
    return {"steps": step, "miou": miou.value, "per_class": miou.per_class, "parameters": miou.parameters}


def answers(nets: Sequence[str], encoder: str) -> dict[str, Any]:
    """Time and multiply-adds of an answer, the first network against each other one."""
    x = networks.picture(1, 3, SIZE)
    arms = []
    plan = Plan(
        quick=False, repeats=15, budget=120, threads=torch.get_num_threads(), dtypes=("bf16", "fp32"), configs={}
    )
    for net in nets:
        own = [flag.removeprefix("--") for flag in flags(net, encoder)]
        network = networks.ours(CONFIG, dict(zip(own[::2], own[1::2], strict=True)), net)
        arms.append(Arm(net, networks.inference(network, x, plan.native), network.facts(x)))
    return compare(f"inference, {SIZE[1]}x{SIZE[0]}, {plan.native}", arms, plan, batch=1, dtype=plan.native)


if __name__ == "__main__":
    sys.exit(main())
